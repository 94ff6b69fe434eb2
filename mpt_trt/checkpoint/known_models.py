"""Shapes of known models, for planning and random weights without their checkpoints.

Building and running engines use each checkpoint's own config.json instead.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from mpt_trt.checkpoint.hf_config import parse_hf_config
from mpt_trt.model.config import MptConfig

COMMON: dict[str, Any] = {"vocab_size": 50432, "max_seq_len": 2048}
MPT_7B = COMMON | {"d_model": 4096, "n_heads": 32, "n_layers": 32}
MPT_30B = COMMON | {"d_model": 7168, "n_heads": 64, "n_layers": 48, "max_seq_len": 8192}

# Fields of each model's config.json on the hub, with MPT's names, by the last part of its hub id.
SHIPPED: dict[str, dict[str, Any]] = {
    "mpt-7b": MPT_7B,
    "mpt-7b-instruct": MPT_7B,
    "mpt-7b-chat": MPT_7B,
    "mpt-7b-storywriter": MPT_7B
    | {"max_seq_len": 65536, "attn_config": {"alibi_bias_max": 16, "clip_qkv": 6}},
    "mpt-7b-8k": MPT_7B | {"max_seq_len": 8192},
    "mpt-30b": MPT_30B,
    "mpt-30b-instruct": MPT_30B,
    "mpt-1b-redpajama-200b": {
        "d_model": 2048,
        "n_heads": 16,
        "n_layers": 24,
        "vocab_size": 50368,
        "max_seq_len": 2048,
        "attn_config": {"qk_ln": True},
    },
    "replit-code-v1-3b": {
        "d_model": 2560,
        "n_heads": 32,
        "n_layers": 32,
        "vocab_size": 32768,
        "max_seq_len": 2048,
    },
    "replit-code-v1_5-3b": {
        "d_model": 3072,
        "n_heads": 24,
        "n_layers": 32,
        "vocab_size": 32768,
        "max_seq_len": 4096,
        "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 8},
    },
}
# Invented sizes for benchmarks.
BENCHMARKS: dict[str, dict[str, Any]] = {
    "bench-1.3b": COMMON | {"d_model": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 50368},
    "bench-354m": COMMON | {"d_model": 1024, "n_heads": 16, "n_layers": 24, "vocab_size": 50368},
}
SHAPES = SHIPPED | BENCHMARKS


def hub_config(name: str, num_layers: int | None = None, dtype: str = "float16") -> dict[str, Any]:
    """Makes a hub-style config.json for a key of SHAPES. num_layers: None: the model's number."""
    shape = SHAPES[name]
    attention = {"attn_type": "multihead_attention", "alibi": True}
    return {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        **shape,
        "n_layers": shape["n_layers"] if num_layers is None else num_layers,
        "expansion_ratio": 4,
        "no_bias": True,
        "learned_pos_emb": True,
        "attn_config": attention | shape.get("attn_config", {}),
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


@functools.cache
def known_config(name: str) -> MptConfig:
    """Architecture of a key of SHAPES."""
    return parse_hf_config(hub_config(name), Path(name, "config.json"))
