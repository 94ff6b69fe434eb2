#!/usr/bin/env python3
"""Writes an MPT checkpoint of a known model's shape with random weights, for tests and benchmarks.

Weights are made and written a rank at a time, so that a full MPT-7B is made on a small machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.checkpoint.known_models import SHAPES, hub_config
from mpt_trt.cli.console import run_cli
from mpt_trt.cli.progress import bytes_progress

if TYPE_CHECKING:
    import torch

    from mpt_trt.model.tensors import Weight

SHARD_BYTES = 1 << 30
WEIGHT_STD = 0.02


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", choices=SHAPES, required=True, help="whose shape")
    parser.add_argument("--layers", type=int, help="number of blocks (default: the model's)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float16",
        help="(default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the result")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import torch

    from mpt_trt.checkpoint.hf_config import read_hf_config
    from mpt_trt.model.tensors import weights
    from mpt_trt.system.files import replace_directory

    dtype = getattr(torch, arguments.dtype)
    with replace_directory(arguments.output_dir) as folder:
        content = hub_config(arguments.like, arguments.layers, arguments.dtype)
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        stored = [w for w in weights(read_hf_config(folder)) if w.hf_name is not None]
        total = sum(_byte_size(weight, dtype) for weight in stored)
        with bytes_progress(f"Writing {arguments.output_dir}", total) as advance:
            write_shards(folder, stored, dtype, arguments.seed, advance)


def write_shards(
    folder: Path, stored: list[Weight], dtype: torch.dtype, seed: int, advance
) -> None:
    """Writes the weights in files of about 1 GiB, and their index."""
    from safetensors.torch import save_file

    groups = list(_groups(stored, dtype))
    weight_map = {}
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
    import math

    return math.prod(weight.shape) * dtype.itemsize


def _random(weight: Weight, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Norm weights about 1, all others about 0; the same for the same seed and name."""
    import zlib

    import torch

    generator = torch.Generator().manual_seed(seed + zlib.crc32(weight.name.encode()))
    values = torch.randn(weight.shape, generator=generator) * WEIGHT_STD
    return (values + 1 if "layernorm.weight" in weight.name else values).to(dtype)


if __name__ == "__main__":
    run_cli(main)
