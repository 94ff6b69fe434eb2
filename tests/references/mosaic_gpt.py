"""mosaic_gpt and replit_lm in float64, written from their published code.

MosaicML's examples 0.0.4 (`mosaic_gpt.py`, `layers/{attention,gpt_blocks}.py`), whose configuration
and layer names `mosaicml/mpt-1b-redpajama-200b` and `replit/replit-code-v1-3b` share. It takes
config.json and the state dict as they are on disk, and knows nothing of the library under test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear


def forward(config: Mapping[str, Any], state: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits, float64 `[seq, vocab]`, of one sequence of token ids `[seq]`."""
    state = {name.removeprefix("transformer."): t.double() for name, t in state.items()}
    hidden = state["wte.weight"][ids]
    if not config["alibi"]:
        hidden = hidden + state["wpe.weight"][: len(ids)]
    for layer in range(config["n_layers"]):
        block = f"blocks.{layer}."
        hidden = hidden + _attention(config, state, block, _norm(state, block + "ln_1", hidden))
        up = gelu(_linear(state, block + "mlp.mlp_up", _norm(state, block + "ln_2", hidden)))
        hidden = hidden + _linear(state, block + "mlp.mlp_down", up)
    scale = config.get("logit_scale")
    if scale == "inv_sqrt_d_model":
        scale = 1 / math.sqrt(config["d_model"])
    logits = _norm(state, "ln_f", hidden) @ state["wte.weight"].T
    return logits if scale is None else logits * scale


def _attention(
    config: Mapping[str, Any], state: Mapping[str, Tensor], block: str, hidden: Tensor
) -> Tensor:
    length, width = hidden.shape
    heads = config["n_heads"]
    packed = _linear(state, block + "attn.Wqkv", hidden)
    if config.get("attn_clip_qkv"):
        packed = packed.clamp(-config["attn_clip_qkv"], config["attn_clip_qkv"])
    query, key, value = packed.chunk(3, dim=-1)
    if config["attn_qk_ln"]:
        query = _norm(state, block + "attn.q_ln", query)
        key = _norm(state, block + "attn.k_ln", key)
    query, key, value = (x.view(length, heads, -1).transpose(0, 1) for x in (query, key, value))
    scale = config.get("softmax_scale") or 1 / math.sqrt(width // heads)
    scores = query @ key.transpose(1, 2) * scale
    if config["alibi"]:
        # All positions count from the last one; slopes of all heads are one geometric sequence.
        steps = torch.arange(1, heads + 1).double() * (config.get("alibi_bias_max", 8) / heads)
        scores = scores + torch.arange(1 - length, 1).double() / (2.0 ** steps.view(-1, 1, 1))
    future = torch.ones(length, length).triu(1).bool()
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ value
    return _linear(state, block + "attn.out_proj", mixed.transpose(0, 1).reshape(length, width))


def _norm(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)


def _linear(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))
