"""One MPT block in plain float32 PyTorch, for the architectures that transformers does not have.

Its source is llm-foundry's definition of MPT (`models/layers/{attention,blocks,ffn,norm}.py`):
pre-norm; `Wqkv` has rows Q | K | V; its output is clamped before `q_ln` and `k_ln`, which span all
heads, see it; query head i reads key-value head `i // (num_heads / num_kv_heads)`; exact GELU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mpt_trt.config import MptConfig, alibi_slopes

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class PlainBlock:
    """A block over one whole sequence; its weights come with each call.

    attention_bias: what is added to the scores, float32 `[num_heads or 1, seq, seq]`.
    """

    config: MptConfig
    attention_bias: Tensor

    def __call__(self, tensors: Tensors, hidden: Tensor) -> Tensor:
        """`[seq, hidden]` to `[seq, hidden]`.

        tensors: float32, by name within the block, e.g. `attn.Wqkv.weight`.
        """
        normed = model_norm(self.config, _part(tensors, "norm_1"), hidden)
        hidden = hidden + self._attention(tensors, normed)
        normed = model_norm(self.config, _part(tensors, "norm_2"), hidden)
        wide = functional.gelu(functional.linear(normed, **_part(tensors, "ffn.up_proj")))
        return hidden + functional.linear(wide, **_part(tensors, "ffn.down_proj"))

    def _attention(self, tensors: Tensors, normed: Tensor) -> Tensor:
        config = self.config
        packed = functional.linear(normed, **_part(tensors, "attn.Wqkv"))
        if config.clip_qkv is not None:
            packed = packed.clamp(-config.clip_qkv, config.clip_qkv)
        sizes = [config.hidden_size, config.kv_size, config.kv_size]
        query, key, value = packed.split(sizes, dim=-1)
        if config.qk_ln:
            query = _layer_norm(_part(tensors, "attn.q_ln"), query, config.qk_ln_epsilon)
            key = _layer_norm(_part(tensors, "attn.k_ln"), key, config.qk_ln_epsilon)
        context = functional.scaled_dot_product_attention(
            *(self._by_head(part) for part in (query, key, value)),
            attn_mask=self.attention_bias[None],
            scale=config.softmax_scale,
            enable_gqa=True,
        )
        merged = context[0].transpose(0, 1).flatten(1)
        return functional.linear(merged, **_part(tensors, "attn.out_proj"))

    def _by_head(self, features: Tensor) -> Tensor:
        """`[seq, heads * head_dim]` to `[1, heads, seq, head_dim]`."""
        return features.unflatten(-1, (-1, self.config.head_dim)).transpose(0, 1)[None]


def causal_bias(config: MptConfig, length: int) -> Tensor:
    """ALiBi where the model has it, and -inf for keys after the query.

    float32 `[num_heads, length, length]`, or `[1, length, length]` without ALiBi.
    """
    positions = torch.arange(length)
    distance = positions[None, :] - positions[:, None]
    slopes = torch.zeros(1)
    if config.position_embedding == "alibi":
        slopes = torch.tensor(alibi_slopes(config.num_heads, config.alibi_bias_max))
    return (slopes[:, None, None] * distance).masked_fill(distance > 0, -torch.inf)


def model_norm(config: MptConfig, tensors: Tensors, values: Tensor) -> Tensor:
    """The model's kind of norm over the last axis; tensors: `weight` and maybe `bias`."""
    if config.norm_type == "layernorm":
        return _layer_norm(tensors, values, config.layer_norm_epsilon)
    weight = tensors["weight"]
    return functional.rms_norm(values, weight.shape, weight, config.layer_norm_epsilon)


def _layer_norm(tensors: Tensors, values: Tensor, epsilon: float) -> Tensor:
    return functional.layer_norm(values, values.shape[-1:], **tensors, eps=epsilon)


def _part(tensors: Tensors, name: str) -> dict[str, Tensor]:
    """`weight` and, where the model has it, `bias` of one layer."""
    keys = [key for key in ("weight", "bias") if f"{name}.{key}" in tensors]
    return {key: tensors[f"{name}.{key}"] for key in keys}
