"""Writes and reads the demo model's folder in transformers' format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import MptForCausalLM

from mpt_trt.errors import MptTrtError
from tools.demo_model.corpus import END_OF_TEXT
from tools.demo_model.recipe import Architecture
from tools.demo_model.tokens import END_OF_TEXT_ID


def hf_config(architecture: Architecture) -> dict:
    """Makes config.json in transformers' own format."""
    return {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "d_model": architecture.hidden_size,
        "n_heads": architecture.num_heads,
        "n_layers": architecture.num_layers,
        "expansion_ratio": architecture.expansion_ratio,
        "max_seq_len": architecture.max_seq_len,
        "vocab_size": architecture.vocab_size,
        "layer_norm_epsilon": architecture.layer_norm_epsilon,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": architecture.alibi_bias_max,
            "attn_impl": "torch",
            "attn_pdrop": 0,
            "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False,
            "clip_qkv": None,
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": None,
        },
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "dtype": "float16",
        "torch_dtype": "float16",
        "emb_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embedding_fraction": 1.0,
        "initializer_range": 0.02,
        "learned_pos_emb": False,
        "logit_scale": None,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def write_model(
    folder: Path, architecture: Architecture, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Writes the files that transformers loads. weights: float16."""
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes files that only their owner can read.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "config.json", hf_config(architecture))
    special_ids = {f"{kind}_token_id": END_OF_TEXT_ID for kind in ("bos", "eos", "pad")}
    write_json(folder / "generation_config.json", special_ids)
    special_tokens = {f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "pad")}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": architecture.max_seq_len,
            "clean_up_tokenization_spaces": False,
            **special_tokens,
        },
    )


def to_float16(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round to float16; raises MptTrtError if a value leaves its range."""
    rounded = {name: tensor.half().cpu().contiguous() for name, tensor in weights.items()}
    broken = [name for name, tensor in rounded.items() if not tensor.isfinite().all()]
    if broken:
        raise MptTrtError(f"not finite in float16: {', '.join(broken)}")
    return rounded


def load_in_transformers(folder: Path) -> Any:
    """Loads MptForCausalLM in float32; raises MptTrtError unless all weights are used."""
    # Its type annotations omit that it may return a pair.
    loaded: Any = MptForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    problems = {key: names for key, names in report.items() if names}
    if problems:
        raise MptTrtError(f"transformers does not load {folder}: {problems}")
    return model.eval()


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
