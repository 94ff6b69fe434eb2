"""mosaic_gpt and replit_lm, from their checkpoints to logits, against their published semantics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mpt_trt.evaluation.reference import reference_logits
from references import mosaic_gpt
from support.checkpoints import CheckpointSpec, tensors, write_checkpoint
from support.engines import convert, deviation, feed, make_network, open_network

BASE = CheckpointSpec(seed=3)
# Their names by those of MPT.
NAMES = {
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "norm_f": "ln_f",
    "ffn.up_proj": "mlp.mlp_up",
    "ffn.down_proj": "mlp.mlp_down",
}
SPECS = {
    "replit-code-v1-3b": ("replit_lm", BASE),
    "mpt-1b-redpajama-200b": ("mosaic_gpt", replace(BASE, qk_ln=True)),
    "clip_qkv, alibi_bias_max": ("mosaic_gpt", replace(BASE, clip_qkv=0.5, alibi_bias_max=16)),
    "learned positions, biases": ("mosaic_gpt", replace(BASE, alibi=False, no_bias=False)),
    "qk_ln, biases": ("mosaic_gpt", replace(BASE, qk_ln=True, no_bias=False)),
    "scales": (
        "replit_lm",
        replace(BASE, softmax_scale=0.2, logit_scale="inv_sqrt_d_model", expansion_ratio=2),
    ),
}


def config_of(model_type: str, spec: CheckpointSpec) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "d_model": spec.hidden_size,
        "n_heads": spec.num_heads,
        "n_layers": spec.num_layers,
        "mlp_ratio": spec.expansion_ratio,
        "max_seq_len": spec.max_seq_len,
        "vocab_size": spec.vocab_size,
        "alibi": spec.alibi,
        "alibi_bias_max": spec.alibi_bias_max,
        "attn_clip_qkv": spec.clip_qkv,
        "attn_qk_ln": spec.qk_ln,
        "softmax_scale": spec.softmax_scale,
        "logit_scale": spec.logit_scale,
        "low_precision_layernorm": True,
        "no_bias": spec.no_bias,
        "prefix_lm": False,
    }


def their_tensors(spec: CheckpointSpec) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors(spec).items():
        for plain, theirs in NAMES.items():
            name = name.replace(plain, theirs)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize(("model_type", "spec"), SPECS.values(), ids=SPECS)
def test_logits(tmp_path: Path, model_type: str, spec: CheckpointSpec) -> None:
    folder = write_checkpoint(tmp_path / "hf", spec)
    config, state = config_of(model_type, spec), their_tensors(spec)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, (1, 15))
    expected = mosaic_gpt.forward(config, state, torch.from_numpy(ids[0])).numpy()

    assert deviation(reference_logits(folder, ids[0].tolist()).numpy(), expected) < 1e-4
    engine = open_network(make_network(convert(folder, tmp_path / "1-gpu"), tmp_path / "network"))
    assert deviation(feed(engine, ids, [8, 1, 1, 1, 4])[0], expected) < 1e-4
