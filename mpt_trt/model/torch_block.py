"""One MPT block in plain PyTorch, which the reference and calibration compute with.

It follows llm-foundry's definition of MPT (`models/layers/{attention,blocks,ffn,norm}.py`):
pre-norm; `Wqkv` has rows Q | K | V; its output is clamped before `q_ln` and `k_ln`, which span all
heads; rope rotates their output; query head i reads key-value head `i // (num_heads /
num_kv_heads)`; exact GELU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpt_trt.model.config import MptConfig, alibi_slopes
from mpt_trt.model.rope import rope_frequencies

Tensors = Mapping[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)


class PlainBlock(nn.Module):
    """A block over whole sequences; submodules have llm-foundry's names."""

    def __init__(self, config: MptConfig):
        super().__init__()
        self.norm_1 = model_norm(config)
        self.attn = PlainAttention(config)
        self.norm_2 = model_norm(config)
        self.ffn = PlainFeedForward(config)

    def forward(self, hidden: Tensor, attention_bias: Tensor) -> Tensor:
        """Maps `[batch, seq, hidden]` to `[batch, seq, hidden]`; attention_bias: `causal_bias`."""
        attended: Tensor = hidden + self.attn(self.norm_1(hidden), attention_bias)
        output: Tensor = attended + self.ffn(self.norm_2(attended))
        return output


class PlainAttention(nn.Module):
    """Self-attention; the outputs of `key` and `value` are what a KV cache would store."""

    def __init__(self, config: MptConfig):
        super().__init__()
        self.config = config
        hidden, kv_size = config.hidden_size, config.kv_size
        self.Wqkv = nn.Linear(hidden, config.qkv_size, bias=config.bias)
        self.q_ln = _qk_norm(config, hidden)
        self.k_ln = _qk_norm(config, kv_size)
        self.key, self.value = nn.Identity(), nn.Identity()
        self.out_proj = nn.Linear(hidden, hidden, bias=config.bias)

    def forward(self, normed: Tensor, attention_bias: Tensor) -> Tensor:
        """Maps `[batch, seq, hidden]` to `[batch, seq, hidden]`."""
        config = self.config
        packed: Tensor = self.Wqkv(normed)
        if config.clip_qkv is not None:
            packed = packed.clamp(-config.clip_qkv, config.clip_qkv)
        sizes = [config.hidden_size, config.kv_size, config.kv_size]
        query, key, value = torch.split(packed, sizes, dim=-1)
        query, key = self._rotate(self.q_ln(query)), self._rotate(self.k_ln(key))
        key, value = self.key(key), self.value(value)
        context = functional.scaled_dot_product_attention(
            self._by_head(query),
            self._by_head(key),
            self._by_head(value),
            attn_mask=attention_bias[None],
            scale=config.softmax_scale,
            enable_gqa=True,
        )
        output: Tensor = self.out_proj(context.transpose(1, 2).flatten(2))
        return output

    def _rotate(self, features: Tensor) -> Tensor:
        """Rotates `[batch, seq, heads * head_dim]` by position; without rope, returns it."""
        if self.config.rope is None:
            return features
        frequencies = rope_frequencies(self.config.rope, self.config.head_dim)
        positions = torch.arange(features.shape[1], dtype=torch.float64)
        angles = positions[:, None] * torch.tensor(frequencies, dtype=torch.float64)
        cosine, sine = (part[:, None].to(features) for part in (angles.cos(), angles.sin()))
        heads = features.reshape(*features.shape[:-1], -1, self.config.head_dim)
        first, second = heads.chunk(2, dim=-1)
        rotated = (first * cosine - second * sine, second * cosine + first * sine)
        return torch.cat(rotated, dim=-1).flatten(-2)

    def _by_head(self, features: Tensor) -> Tensor:
        """Maps `[batch, seq, heads * head_dim]` to `[batch, heads, seq, head_dim]`."""
        by_head = features.reshape(*features.shape[:-1], -1, self.config.head_dim)
        return by_head.transpose(1, 2)


class PlainFeedForward(nn.Module):
    """The feed-forward layer: two linear layers with exact GELU between them."""

    def __init__(self, config: MptConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, normed: Tensor) -> Tensor:
        """Maps `[batch, seq, hidden]` to `[batch, seq, hidden]`."""
        output: Tensor = self.down_proj(functional.gelu(self.up_proj(normed)))
        return output


def model_norm(config: MptConfig) -> nn.Module:
    """Makes a norm over the hidden features, of the model's kind."""
    size, epsilon = config.hidden_size, config.layer_norm_epsilon
    if config.norm_type == "layernorm":
        return nn.LayerNorm(size, epsilon, bias=config.bias)
    return nn.RMSNorm(size, epsilon)


def _qk_norm(config: MptConfig, size: int) -> nn.Module:
    if not config.qk_ln:
        return nn.Identity()
    return nn.LayerNorm(size, config.qk_ln_epsilon, bias=config.bias)


def causal_bias(config: MptConfig, length: int) -> Tensor:
    """Computes the term added to attention scores: ALiBi, if any, and -inf for later keys.

    Returns float32 `[num_heads, length, length]`, or `[1, length, length]` without ALiBi.
    """
    positions = torch.arange(length)
    distance = positions[None, :] - positions[:, None]
    slopes = torch.zeros(1)
    if config.position_embedding == "alibi":
        slopes = torch.tensor(alibi_slopes(config.num_heads, config.alibi_bias_max))
    return (slopes[:, None, None] * distance).masked_fill(distance > 0, -torch.inf)


def with_weights(make: Callable[[], Module], tensors: Tensors) -> Module:
    """Makes a module for inference that uses `tensors` themselves as its weights.

    tensors: all the module's weights, by name within it, e.g. `attn.Wqkv.weight`.
    """
    with torch.device("meta"):
        module = make()
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    return module.requires_grad_(False).eval()
