"""Shared code of tests of FT directories: hashes, slices taken by hand, activation amax."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.ft.int8 import Int8Conversion
from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import weights
from mpt_trt.quantization.activation_amax import ActivationAmax, LinearAmax
from support.checkpoints import SEEDED_SPECS, CheckpointSpec, seeded_tensors, tensors
from support.paths import tool_path

CLI = tool_path("convert_hf_mpt_to_ft.py")
FT_LAYERS = {
    "attn.Wqkv": "attention.query_key_value",
    "attn.out_proj": "attention.dense",
    "ffn.up_proj": "mlp.dense_h_to_4h",
    "ffn.down_proj": "mlp.dense_4h_to_h",
}


def write_ft(
    checkpoint: Path,
    target: Path,
    storage_type: str = "float32",
    tp_size: int = 1,
    int8: Int8Conversion | None = None,
    workers: int = 0,
) -> MptConfig:
    """Converts with only the library; returns the configuration that it was given.

    Forks of a test process with all its packages take longer than these small conversions, so they
    run in it. Tests of the command line use other processes.
    """
    config = read_hf_config(checkpoint)
    provenance = {"source": "somewhere"}
    conversion = ConversionSettings(storage_type, tp_size, workers, "name", provenance, int8)
    opened = HfCheckpoint(checkpoint, weights(config))
    write_ft_checkpoint(opened, config, conversion, target)
    return config


def names_in(folder: Path) -> set[str]:
    """Names of all entries except the tokenizer, which travels with a checkpoint."""
    if not folder.exists():
        return set()
    return {path.name for path in folder.iterdir() if path.name != "tokenizer"}


def hashes_in(folder: Path) -> dict[str, str]:
    """sha256 of all files except our manifest and tokenizer."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file() and path.name != "manifest.json"
    }


def rank_rows(spec: CheckpointSpec, rank: int, tp_size: int) -> list[int]:
    """Rows of Wqkv that a rank holds: its query heads, then the K and V heads that they use."""
    num_kv_heads = spec.num_kv_heads or spec.num_heads
    per_rank = spec.num_heads // tp_size
    queries = range(rank * per_rank, (rank + 1) * per_rank)
    used = sorted({head // (spec.num_heads // num_kv_heads) for head in queries})
    heads = [*queries]
    heads += [spec.num_heads + head for head in used]
    heads += [spec.num_heads + num_kv_heads + head for head in used]
    return [head * spec.head_dim + row for head in heads for row in range(spec.head_dim)]


def seeded_amax(name: Literal["a", "gqa"]) -> ActivationAmax:
    """The amax that NVIDIA's converter was given instead of calibration, for a seeded checkpoint.

    The i-th block matrix in sorted order draws from `PCG64(SeedSequence([seed, 7777, i]))`.
    """
    spec = SEEDED_SPECS[name]
    return _amax(spec, seeded_tensors(name), 0.01)


def random_amax(spec: CheckpointSpec, smallest: float = 0.01) -> ActivationAmax:
    """Ranges of a model that was never run."""
    return _amax(spec, tensors(spec), smallest)


def _amax(spec: CheckpointSpec, content: dict, smallest: float) -> ActivationAmax:
    found: ActivationAmax = [{} for _ in range(spec.num_layers)]
    matrices = sorted(
        name.removesuffix(".weight")
        for name, tensor in content.items()
        if ".blocks." in name and tensor.ndim == 2
    )
    for index, name in enumerate(matrices):
        seed = np.random.SeedSequence([spec.seed, 7777, index])
        generator = np.random.Generator(np.random.PCG64(seed))
        x, y = (
            np.abs(generator.standard_normal(size, dtype=np.float32)) + np.float32(smallest)
            for size in reversed(content[f"{name}.weight"].shape)
        )
        _, _, layer, hf_name = name.split(".", 3)
        found[int(layer)][FT_LAYERS[hf_name]] = LinearAmax(x, y)
    return found
