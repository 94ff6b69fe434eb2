#!/usr/bin/env python3
"""Write the generated tables of the documentation.

They are in requirements.md (memory and disk space of models), backends.md (features of backends),
config.md (keys of config.yaml), scripts.md and proofs.md (facts and checks). Two lines mark the
place of each table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from mpt_trt.checkpoint.known_models import SHIPPED, known_config
from mpt_trt.cli.console import run_cli
from mpt_trt.cli.parser import tool_parser
from mpt_trt.engines import backend_support, memory
from mpt_trt.engines.memory import GB
from mpt_trt.engines.spec import BuildLimits, EngineSpec
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import VocabularySharding, is_legal
from mpt_trt.quantization.schemes import UNQUANTIZED, Awq, Fp8, Quantization, WeightOnly
from mpt_trt.workflow import resources
from mpt_trt.workflow.settings import variant_default
from mpt_trt.workflow.target_names import STORAGES
from tools import external_checks, reference_pages
from tools.markdown import replace_between_marks

TP_SIZES = (1, 2, 4, 8)
# Type and quantization of each row, by its name in config.yaml.
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


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "tools/update_docs.py",
    )
    parser.add_argument(
        "--docs_dir",
        type=Path,
        default=REPOSITORY / "docs",
        help="folder of the documentation (default: %(default)s)",
    )
    return parser


def main() -> None:
    update(make_parser().parse_args().docs_dir)


def update(docs: Path) -> None:
    """Write the tables into the files of the folder.

    Raises MptTrtError when a file lacks the lines that mark their place.
    """
    for name, table in tables().items():
        replace_between_marks(docs / name, table)


def tables() -> dict[str, str]:
    """The generated table of each file, by the file's name."""
    return {
        "requirements.md": requirements(),
        "backends.md": backend_support.table(),
        "config.md": reference_pages.configuration(),
        "scripts.md": reference_pages.scripts(REPOSITORY),
        "proofs.md": external_checks.tables(REPOSITORY),
    }


def requirements() -> str:
    """Markdown tables of all predefined models; models with the same requirements share one."""
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
    """Rows for each type and tensor-parallel size; types with the same requirements share one."""
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
    """Cells of a row, except the first."""
    sizes = (
        resources.ft_checkpoint_disk(spec),
        resources.engine_disk(spec),
        resources.build_memory(spec),
        memory.rank_weights(spec),
        memory.gpu_memory(spec),
    )
    in_gb = (f"{size / GB:.1f} GB" for size in sizes)
    return (str(spec.tp_size), *in_gb, memory.gpus_in_words(spec))


if __name__ == "__main__":
    run_cli(main)
