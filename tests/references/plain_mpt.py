"""A plain fp32 forward pass of MPT, written to be read and used as the reference in tests.

It takes `config.json` and the state dict as they are on disk, keeps no cache and knows nothing of
the library under test. llm-foundry defines MPT; the facts below were read from its
`models/mpt/{modeling,configuration}_mpt.py` and `models/layers/{attention,blocks, ffn,norm}.py`:

* Blocks are pre-norm: `x += attn(norm_1(x))`, then `x += ffn(norm_2(x))`; `norm_f` before the
  head. The feed-forward is `down_proj(gelu(up_proj(x)))` with the exact (erf) GELU, of width
  `int(d_model * expansion_ratio)`.
* `Wqkv` has rows Q | K | V; its output is clamped to `+-clip_qkv` before `q_ln` and `k_ln` see
  it. These span all heads: `[d_model]` and `[kv_n_heads * head_dim]`.
* The block does not hand its `norm_type` and epsilon to the attention layer: `q_ln` and `k_ln`
  are layer norms with epsilon 1e-5 unless `attn_config` itself says otherwise, also in a model
  whose `norm_type` is an rmsnorm.
* Query head `h` reads key-value head `h // (n_heads / kv_n_heads)` (`repeat_interleave`).
* `rope` rotates queries and keys after `q_ln` and `k_ln`: features i and i + head_dim/2 of a head,
  taken as a complex number, are multiplied by `exp(1j * position * rope_theta^(-2i/head_dim))`.
  flash-attn's `RotaryEmbedding` (`dail`) and that of transformers' Llama (`hf`) do the same.
* `rope_hf_config`: "linear" divides positions by `factor`; "dynamic" raises theta for sequences
  longer than `max_seq_len`; "llama3" divides the frequency of long waves by `factor`.
* Scores are `q.k * softmax_scale` (default `1/sqrt(head_dim)`) + ALiBi, masked causally.
* ALiBi or rope switches learned positions off whatever `learned_pos_emb` says (the hub's files say
  true next to `alibi: true`); without it `wpe[position]` is added to the token embedding.
* Every norm has epsilon 1e-5 by default. Later llm-foundry reads `norm_eps`; transformers'
  MptConfig calls it `layer_norm_epsilon`. `no_bias` removes every bias, those of norms too;
  rms norms never have one.
* Logits are multiplied by `logit_scale` (`"inv_sqrt_d_model"`: `1/sqrt(d_model)`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]

LAYER_NORMS = ("layernorm", "low_precision_layernorm")
RMS_NORMS = ("rmsnorm", "low_precision_rmsnorm", "triton_rmsnorm")
DEFAULT_EPSILON = 1e-5


def forward(
    config: Config, tensors: Weights, input_ids: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits of every position, computed in `dtype` with a causal mask and no padding.

    Args:
        config: the parsed `config.json`, llm-foundry's or transformers'.
        tensors: the state dict of the causal language model, names with the `transformer.`
            prefix, any float dtype. Biases are applied where the state dict has them.
        input_ids: `[batch, seq]` integer token ids.
        dtype: type of all arithmetic.

    Returns:
        `[batch, seq, vocab]` of `dtype`.

    Raises:
        KeyError: a weight or setting that the configuration asks for is missing.
        ValueError: the configuration asks for something not written here, contradicts itself,
            or the sequence is longer than `max_seq_len`.
    """
    _refuse_unknown_features(config)
    weights = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    seq_len = input_ids.shape[1]
    if seq_len > config["max_seq_len"]:
        raise ValueError(f"{seq_len} tokens, but max_seq_len is {config['max_seq_len']}")

    x = F.embedding(input_ids, weights["transformer.wte.weight"])
    if has_learned_positions(config):
        x = x + weights["transformer.wpe.weight"][:seq_len]

    bias = attention_bias(config, seq_len).to(dtype)
    for layer in range(config["n_layers"]):
        block = f"transformer.blocks.{layer}"
        normed = _block_norm(config, weights, f"{block}.norm_1", x)
        x = x + _attention(config, weights, f"{block}.attn", normed, bias)
        normed = _block_norm(config, weights, f"{block}.norm_2", x)
        x = x + _feed_forward(weights, f"{block}.ffn", normed)
    x = _block_norm(config, weights, "transformer.norm_f", x)

    tied = config.get("tie_word_embeddings", True)
    head = weights["transformer.wte.weight" if tied else "lm_head.weight"]
    return F.linear(x, head) * logit_scale(config)


def has_learned_positions(config: Config) -> bool:
    """Returns whether `wpe` is used: no ALiBi, no rope, and `learned_pos_emb` not false."""
    attn = config["attn_config"]
    has_other = attn.get("alibi", True) or attn.get("rope", False)
    return not has_other and config.get("learned_pos_emb", True)


def num_kv_heads(config: Config) -> int:
    """Key-value heads that `attn_config.attn_type` stands for.

    Raises:
        ValueError: unknown `attn_type`, or `kv_n_heads` contradicts it.
        KeyError: grouped-query attention without `kv_n_heads`.
    """
    attn = config["attn_config"]
    attn_type = attn.get("attn_type", "multihead_attention")
    if attn_type == "grouped_query_attention":
        return attn["kv_n_heads"]
    implied = {"multihead_attention": config["n_heads"], "multiquery_attention": 1}
    if attn_type not in implied:
        raise ValueError(f"unknown attn_type {attn_type!r}")
    if attn.get("kv_n_heads") not in (None, implied[attn_type]):
        raise ValueError(f"kv_n_heads {attn['kv_n_heads']} contradicts attn_type {attn_type!r}")
    return implied[attn_type]


def alibi_slopes(num_heads: int, bias_max: float = 8) -> Tensor:
    """ALiBi slope of each head, `[num_heads]` float32.

    With `n` the next power of two, the candidates are `2 ** (-bias_max * k / n)` for k = 1..n.
    When `num_heads` is less than `n`, those of even k come first, then those of odd k, and the
    first `num_heads` are taken (llm-foundry's `gen_slopes`; Press et al., arXiv 2108.12409, for
    `num_heads` a power of two and `bias_max` 8).
    """
    n = 1
    while n < num_heads:
        n *= 2
    steps = list(range(1, n + 1))
    if n != num_heads:
        steps = [k for k in steps if k % 2 == 0] + [k for k in steps if k % 2 == 1]
    return torch.tensor([2.0 ** (-bias_max * k / n) for k in steps[:num_heads]])


def attention_bias(config: Config, seq_len: int) -> Tensor:
    """Term added to the scaled scores: `[n_heads, seq, seq]`, -inf above the diagonal.

    ALiBi is `slope * (key position - query position)`. llm-foundry adds `slope * (key position
    - last position)`; the two differ by a constant per query, which the softmax removes.
    """
    positions = torch.arange(seq_len)
    distance = (positions[None, :] - positions[:, None]).float()
    bias = torch.zeros(config["n_heads"], seq_len, seq_len)
    attn = config["attn_config"]
    if attn.get("alibi", True):
        slopes = alibi_slopes(config["n_heads"], attn.get("alibi_bias_max", 8))
        bias = slopes[:, None, None] * distance
    return bias.masked_fill(distance > 0, -math.inf)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Zero mean, unit (biased) variance over the last axis, then `* weight + bias`."""
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + epsilon)` over the last axis; no mean is taken off."""
    return weight * x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + epsilon)


def logit_scale(config: Config) -> float:
    """Factor on the logits; 1 when `logit_scale` is null or absent.

    Raises:
        ValueError: a text other than `inv_sqrt_d_model`.
    """
    scale = config.get("logit_scale")
    if scale is None:
        return 1.0
    if scale == "inv_sqrt_d_model":
        return 1 / math.sqrt(config["d_model"])
    if isinstance(scale, str):
        raise ValueError(f"unknown logit_scale {scale!r}")
    return float(scale)


def _attention(config: Config, weights: Weights, name: str, x: Tensor, bias: Tensor) -> Tensor:
    """Self-attention of one block: x `[batch, seq, d_model]`, bias `[n_heads, seq, seq]`."""
    attn = config["attn_config"]
    num_heads, kv_heads = config["n_heads"], num_kv_heads(config)
    head_dim = config["d_model"] // num_heads

    qkv = _linear(weights, f"{name}.Wqkv", x)
    if attn.get("clip_qkv"):
        qkv = qkv.clamp(-attn["clip_qkv"], attn["clip_qkv"])
    q, k, v = qkv.split([num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    if attn.get("qk_ln"):
        q = _qk_norm(attn, weights, f"{name}.q_ln", q)
        k = _qk_norm(attn, weights, f"{name}.k_ln", k)

    q, k = _split_heads(q, num_heads), _split_heads(k, kv_heads)
    if attn.get("rope"):
        q, k = (rotated(x, rope_angles(config, x.shape[2], head_dim)) for x in (q, k))
    k = k.repeat_interleave(num_heads // kv_heads, dim=1)
    v = _split_heads(v, kv_heads).repeat_interleave(num_heads // kv_heads, dim=1)

    scale = attn.get("softmax_scale")
    if scale is None:
        scale = 1 / math.sqrt(head_dim)
    scores = q @ k.transpose(-1, -2) * scale + bias
    context = torch.softmax(scores, dim=-1) @ v  # [batch, n_heads, seq, head_dim]
    return _linear(weights, f"{name}.out_proj", context.transpose(1, 2).flatten(2))


def rope_angles(config: Config, seq_len: int, head_dim: int) -> Tensor:
    """Angle of every position and pair of features, float64 `[seq, head_dim / 2]`.

    Raises:
        ValueError: an unknown `rope_hf_config.type`.
    """
    attn = config["attn_config"]
    theta = attn.get("rope_theta", 10000)
    scaling = attn.get("rope_hf_config", {}) if attn.get("rope_impl") == "hf" else {}
    kind, factor = scaling.get("type", "no_scaling"), scaling.get("factor", 1.0)
    positions = torch.arange(seq_len, dtype=torch.float64)
    if kind == "linear":
        positions = positions / factor
    elif kind == "dynamic":
        longest = max(seq_len, config["max_seq_len"])
        grown = factor * longest / config["max_seq_len"] - (factor - 1)
        theta = theta * grown ** (head_dim / (head_dim - 2))
    elif kind not in ("no_scaling", "llama3"):
        raise ValueError(f"unknown rope scaling {kind!r}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = 1.0 / theta**exponents
    if kind == "llama3":
        frequencies = torch.stack([_llama3(scaling, frequency) for frequency in frequencies])
    return torch.outer(positions, frequencies)


def _llama3(scaling: Config, frequency: Tensor) -> Tensor:
    """Llama 3.1's scaling: unchanged short waves, stretched long ones, a blend in between."""
    context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Turns pairs of features: x `[batch, heads, seq, head_dim]`, angles `[seq, head_dim / 2]`."""
    real, imaginary = x.double().chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`[batch, seq, num_heads * head_dim]` to `[batch, num_heads, seq, head_dim]`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _feed_forward(weights: Weights, name: str, x: Tensor) -> Tensor:
    hidden = F.gelu(_linear(weights, f"{name}.up_proj", x), approximate="none")
    return _linear(weights, f"{name}.down_proj", hidden)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _block_norm(config: Config, weights: Weights, name: str, x: Tensor) -> Tensor:
    # norm_eps first: only llm-foundry writes it, while a re-save by transformers adds
    # layer_norm_epsilon with its default next to it.
    epsilon = config.get("norm_eps", config.get("layer_norm_epsilon", DEFAULT_EPSILON))
    return _norm(config.get("norm_type", LAYER_NORMS[1]), weights, name, x, epsilon)


def _qk_norm(attn: Config, weights: Weights, name: str, x: Tensor) -> Tensor:
    epsilon = attn.get("norm_eps", DEFAULT_EPSILON)
    return _norm(attn.get("norm_type", LAYER_NORMS[1]), weights, name, x, epsilon)


def _norm(norm_type: str, weights: Weights, name: str, x: Tensor, epsilon: float) -> Tensor:
    weight = weights[f"{name}.weight"]
    if norm_type.lower() in LAYER_NORMS:
        return layer_norm(x, weight, weights.get(f"{name}.bias"), epsilon)
    if norm_type.lower() in RMS_NORMS:
        return rms_norm(x, weight, epsilon)
    raise ValueError(f"unknown norm_type {norm_type!r}")


def _refuse_unknown_features(config: Config) -> None:
    """Raise ValueError for llm-foundry settings that change the result and are not written here."""
    attn, ffn = config["attn_config"], config.get("ffn_config") or {}
    dail = attn.get("rope_dail_config") or {}
    if attn.get("rope") and dail.get("type", "original") != "original":
        raise ValueError(f"rope_dail_config {dict(dail)!r} is not supported")
    for key in ("prefix_lm", "qk_gn", "attn_logit_softcapping"):
        if attn.get(key):
            raise ValueError(f"attn_config.{key} = {attn[key]!r} is not supported")
    if not attn.get("fused_qkv", True) or attn.get("sliding_window_size", -1) != -1:
        raise ValueError("separate q, k, v matrices and sliding windows are not supported")
    if ffn.get("ffn_type", "mptmlp") != "mptmlp" or "ffn_act_fn" in ffn:
        raise ValueError(f"ffn_config {dict(ffn)!r} is not supported")
    for key in ("final_logit_softcapping", "block_overrides"):
        if config.get(key):
            raise ValueError(f"{key} = {config[key]!r} is not supported")
