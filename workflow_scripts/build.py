#!/usr/bin/env python3
"""Builds TensorRT engines from an FT checkpoint.

Flags that chose TensorRT-LLM's plugins are accepted and change nothing: attention, products and
padding are TensorRT's own layers here.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mpt_trt import arguments as options
from mpt_trt.console import run_cli, set_up_logging

if TYPE_CHECKING:
    from mpt_trt.engines.building import BuildRequest

WITHOUT_EFFECT = (
    "use_gpt_attention_plugin",
    "use_gemm_plugin",
    "use_layernorm_plugin",
    "enable_context_fmha",
    "enable_context_fmha_fp32_acc",
    "remove_input_padding",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model_dir", type=Path, required=True, help="a {tp_size}-gpu folder of an FT checkpoint"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="the engine directory")
    parser.add_argument(
        "--world_size", type=int, default=1, help="number of ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--parallel_build",
        action="store_true",
        help="build the ranks' plans at the same time; each needs the memory of one rank",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="must be the checkpoint's storage type, which is the default",
    )
    parser.add_argument("--log_level", default="info", help="(default: %(default)s)")
    options.add_limits(parser)
    options.add_vocabulary(parser)
    options.add_builder(parser)
    group = parser.add_argument_group("accepted, without effect")
    for name in WITHOUT_EFFECT:
        group.add_argument(f"--{name}", nargs="?", const=True, default=False)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    set_up_logging(arguments.log_level)
    from mpt_trt.engines.building import build_engine, build_one_by_one
    from mpt_trt.errors import MptTrtError
    from mpt_trt.ft_checkpoint import read_ft_checkpoint

    ignored = [f"--{name}" for name in WITHOUT_EFFECT if getattr(arguments, name)]
    if ignored:
        logging.info("Without effect here: %s", " ".join(ignored))
    checkpoint = read_ft_checkpoint(arguments.model_dir)
    if checkpoint.tp_size != arguments.world_size:
        raise MptTrtError(
            f"--world_size = {arguments.world_size}, but {arguments.model_dir} was converted for "
            f"{checkpoint.tp_size}; convert with -tp {arguments.world_size}"
        )
    if arguments.dtype not in (None, checkpoint.storage_type):
        raise MptTrtError(
            f"--dtype = {arguments.dtype}, but {arguments.model_dir} is stored in "
            f"{checkpoint.storage_type}; convert with -t {arguments.dtype}"
        )
    request = options.build_request(arguments, options.limits(arguments))
    build_plans = build_side_by_side if arguments.parallel_build else build_one_by_one
    vocabulary = options.vocabulary(arguments)
    build_engine(checkpoint, request, vocabulary, arguments.output_dir, build_plans)
    print(arguments.output_dir)


def build_side_by_side(folder: Path, request: BuildRequest, tp_size: int) -> None:
    """Adds the plans of all ranks to the folder that has their networks, a process a rank."""
    from mpt_trt.errors import MptTrtError

    plans = [folder / f"plan{rank}" for rank in range(tp_size)]
    processes = [
        subprocess.Popen(_rank_command(folder, rank, request, plan))
        for rank, plan in enumerate(plans)
    ]
    try:
        failed = [rank for rank, process in enumerate(processes) if process.wait() != 0]
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    if failed:
        raise MptTrtError(f"rank {failed[0]} could not be built; its own message is above")
    for plan in plans:
        for path in plan.iterdir():
            path.rename(folder / path.name)
        plan.rmdir()


def _rank_command(folder: Path, rank: int, request: BuildRequest, target: Path) -> list[str]:
    return [
        sys.executable,
        str(Path(__file__).with_name("build_rank.py")),
        f"--network_dir={folder}",
        f"--rank={rank}",
        f"--backend={request.backend}",
        f"--output_dir={target}",
        "--compute_capabilities",
        *request.compute_capabilities,
    ]


if __name__ == "__main__":
    run_cli(main)
