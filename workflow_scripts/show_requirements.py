#!/usr/bin/env python3
"""Shows what an engine needs, before anything is fetched or made: disk, host and GPU memory.

With --update it writes the tables of all shipped models into a markdown file, between the two lines
that mark their place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.known_models import SHAPES, SHIPPED, known_config
from mpt_trt.cli import options as options
from mpt_trt.cli.console import run_cli
from mpt_trt.engines import memory
from mpt_trt.engines.memory import GB, EngineSpec
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import VocabularySharding, is_legal
from mpt_trt.quantization.schemes import UNQUANTIZED, Awq, Fp8, Quantization, WeightOnly
from mpt_trt.workflow.settings import variant_choices, variant_default
from mpt_trt.workflow.target_names import STORAGES
from tools.markdown import replace_between_marks

TP_SIZES = (1, 2, 4, 8)
# The kinds of engine that have rows: type and quantization, by the name in config.yaml.
KINDS = {name: (dtype, UNQUANTIZED) for name, dtype in STORAGES.items()} | {
    "int8_weight_only": ("float16", Quantization(WeightOnly(8))),
    "fp8": ("float16", Quantization(Fp8())),
    "int4_awq": ("float16", Quantization(Awq())),
}
COLUMNS = (
    "variant",
    "ranks",
    "FT checkpoint",
    "engine",
    "host memory to build a rank",
    "weights of a rank",
    "GPU memory of a rank",
    "GPUs",
)
WORKERS = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model_dir", type=Path, help="folder of a Hugging Face checkpoint")
    model.add_argument("--like", choices=SHAPES, help="a known model instead")
    model.add_argument("--update", type=Path, metavar="FILE", help="write the tables into FILE")
    parser.add_argument(
        "--dtype",
        choices=variant_choices("dtype"),
        default=variant_default("dtype"),
        help="type of weights, activations and KV cache (default: %(default)s)",
    )
    parser.add_argument(
        "-tp", "--tensor_parallelism", type=int, default=1, help="ranks (default: %(default)s)"
    )
    options.add_limits(parser)
    options.add_vocabulary(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.update is not None:
        replace_between_marks(arguments.update, tables())
        return
    is_known = arguments.like is not None
    config = known_config(arguments.like) if is_known else read_hf_config(arguments.model_dir)
    spec = EngineSpec(
        config,
        arguments.dtype,
        arguments.tensor_parallelism,
        options.limits(arguments),
        VocabularySharding(arguments.shard_embedding, arguments.shard_head),
    )
    print(f"{arguments.like or arguments.model_dir}, {spec.dtype}: {memory.gpus_in_words(spec)}")
    for name, size in parts(spec).items():
        print(f"  {name:44}{size / GB:9.2f} GB")


def parts(spec: EngineSpec) -> dict[str, int]:
    """Everything that is computed of one engine, in bytes."""
    return {
        "disk, FT checkpoint": memory.ft_checkpoint_disk(spec),
        "disk, engine directory": memory.engine_disk(spec),
        f"host memory, conversion ({WORKERS} workers)": memory.conversion_memory(WORKERS),
        "host memory, build of a rank": memory.build_memory(spec),
        "host memory, smoke test on the CPU": memory.smoke_test_memory(spec),
        "GPU memory of a rank": memory.gpu_memory(spec),
        "  weights": memory.rank_weights(spec),
        "  KV cache": memory.kv_cache(spec),
        "  activations (estimate)": memory.activations(spec),
        "  CUDA and libraries (allowance)": memory.GPU_OVERHEAD,
    }


def tables() -> str:
    """A markdown table of all shipped models; models that need the same share one."""
    models: dict[tuple[str, ...], list[str]] = {}
    for name in SHIPPED:
        models.setdefault(tuple(table_rows(known_config(name))), []).append(name)
    rules = "|".join(["---", *["---:"] * (len(COLUMNS) - 2), "---"])
    head = f"| {' | '.join(COLUMNS)} |\n|{rules}|"
    return "\n".join(
        f"### {', '.join(names)}\n\n{head}\n" + "".join(f"{row}\n" for row in rows)
        for rows, names in models.items()
    )


def table_rows(config: MptConfig) -> Iterator[str]:
    """A row for each type and number of ranks; types that need the same share one."""
    limits = BuildLimits(
        *(variant_default(f"max_{name}") for name in ("batch_size", "input_len", "output_len"))
    )
    vocabulary = VocabularySharding(
        variant_default("shard_embedding"), variant_default("shard_head")
    )
    found: dict[tuple[str, ...], list[str]] = {}
    for kind, (dtype, quantization) in KINDS.items():
        for tp_size in filter(lambda size: is_legal(config, size), TP_SIZES):
            spec = EngineSpec(config, dtype, tp_size, limits, vocabulary, quantization)
            found.setdefault(table_cells(spec), []).append(kind)
    for cells, kinds in found.items():
        yield f"| {' | '.join([', '.join(kinds), *cells])} |"


def table_cells(spec: EngineSpec) -> tuple[str, ...]:
    """All cells but the first."""
    sizes = (
        memory.ft_checkpoint_disk(spec),
        memory.engine_disk(spec),
        memory.build_memory(spec),
        memory.rank_weights(spec),
        memory.gpu_memory(spec),
    )
    in_gb = (f"{size / GB:.1f} GB" for size in sizes)
    return (str(spec.tp_size), *in_gb, memory.gpus_in_words(spec))


if __name__ == "__main__":
    run_cli(main)
