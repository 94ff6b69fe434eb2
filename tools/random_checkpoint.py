"""Writes MPT checkpoints of a known model's shape with random weights."""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.known_models import hub_config
from mpt_trt.cli.progress import bytes_progress
from mpt_trt.model.tensors import Weight, weights
from mpt_trt.system.replace import NEVER_REPLACED, replace_directory

SHARD_BYTES = 1 << 30
WEIGHT_STD = 0.02


def run(options: argparse.Namespace) -> None:
    """Write the checkpoint for the options of make_random_checkpoint.py."""
    dtype = getattr(torch, options.dtype)
    with replace_directory(options.output_dir, NEVER_REPLACED, force=options.force) as folder:
        content = hub_config(options.like, options.layers, options.dtype)
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        stored = [w for w in weights(read_hf_config(folder)) if w.hf_name is not None]
        total = sum(_byte_size(weight, dtype) for weight in stored)
        with bytes_progress(f"Writing {options.output_dir}", total) as advance:
            write_shards(folder, stored, dtype, options.seed, advance)


def write_shards(
    folder: Path,
    stored: list[Weight],
    dtype: torch.dtype,
    seed: int,
    advance: Callable[[int], None],
) -> None:
    """Write the weights in files of about 1 GiB, and their index."""
    groups = list(_groups(stored, dtype))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with ThreadPoolExecutor() as pool:
            values = pool.map(lambda weight: _random(weight, dtype, seed), group)
            save_file(dict(zip(map(_name, group), values, strict=True)), folder / name)
        weight_map |= {_name(w): name for w in group}
        advance(sum(_byte_size(w, dtype) for w in group))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _name(weight: Weight) -> str:
    return f"transformer.{weight.hf_name}"


def _groups(stored: list[Weight], dtype: torch.dtype) -> Iterator[list[Weight]]:
    group: list[Weight] = []
    size = 0
    for weight in stored:
        if group and size + _byte_size(weight, dtype) > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(weight)
        size += _byte_size(weight, dtype)
    yield group


def _byte_size(weight: Weight, dtype: torch.dtype) -> int:
    return math.prod(weight.shape) * dtype.itemsize


def _random(weight: Weight, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random values about 1 for norm weights and about 0 for others, fixed by seed and name."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(weight.name.encode()))
    values = torch.randn(weight.shape, generator=generator) * WEIGHT_STD
    return (values + 1 if "layernorm.weight" in weight.name else values).to(dtype)
