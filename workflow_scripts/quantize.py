#!/usr/bin/env python3
"""Calibrates a model for quantization and writes {export_path}/mpt_tp1_rank0.npz.

The model reads pieces of a text while NVIDIA's ModelOpt watches its linear layers, one block at a
time: memory is that of two blocks and of the pieces' hidden states. The file is in AMMO's layout;
an engine of any number of ranks is made from it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import calibration_options as options
from mpt_trt.cli.console import run_command
from mpt_trt.quantization.schemes import GROUP_SIZES
from mpt_trt.workflow.target_names import FORMATS


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--model_dir",
        required=True,
        help="hub id or folder of a Hugging Face checkpoint, or a {tp_size}-gpu folder of an FT "
        "checkpoint",
    )
    add("--revision", default="main", help="on the hub (default: %(default)s)")
    add(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float16",
        help="what a GPU computes in (a CPU: float32); with float16, weights are stored in it, "
        "otherwise in float32 (default: %(default)s)",
    )
    add(
        "--qformat",
        choices=FORMATS,
        required=True,
        help="what for; kv_cache: ranges of keys and values alone, which the others have, too",
    )
    add("--export_path", type=Path, required=True, help="folder of the result")
    add(
        "--awq_block_size",
        type=int,
        choices=GROUP_SIZES,
        help="input features that share a scale, with int4_awq (default: 128, or less where ranks "
        "would share a group)",
    )
    add("--log_level", default="info", help="(default: %(default)s)")
    options.add_calibration(parser)
    return parser


if __name__ == "__main__":
    run_command(make_parser(), "mpt_trt.commands.quantize")
