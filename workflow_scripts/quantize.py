#!/usr/bin/env python3
"""Calibrate a model for quantization and write {export_path}/mpt_tp1_rank0.npz.

The model reads samples of a text, one block at a time, so memory holds two blocks and the samples'
hidden states. NVIDIA's ModelOpt or, for int4_gptq, mpt-trt itself observes the inputs of its linear
layers. The file has AMMO's layout, and serves engines of any tensor-parallel size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import calibration_options as options
from mpt_trt.cli import model_options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.ignored_options import OF_QUANTIZATION, add_ignored
from mpt_trt.cli.parser import tool_parser
from mpt_trt.model.config import DTYPES
from mpt_trt.quantization.schemes import GROUP_SIZES, ScaleChoice
from mpt_trt.workflow.target_names import FORMATS


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/quantize.py --model_dir resources/mpt-demo --qformat int4_awq "
        "--export_path my_calibration",
    )
    add = parser.add_argument
    add(
        "--model_dir",
        required=True,
        help="hub id or folder of a Hugging Face checkpoint, or a {tp_size}-gpu folder of an FT "
        "checkpoint",
    )
    model_options.add_adapter(parser)
    model_options.add_revision(parser)
    add(
        "--dtype",
        choices=DTYPES,
        default="float16",
        help="data type of computation on a GPU; a CPU computes in float32. Weights are stored in "
        "float16 if it is float16, otherwise in float32 (default: %(default)s)",
    )
    add("--export_path", type=Path, required=True, help="folder of the result")
    _add_format(parser)
    add("--log_level", default="info", help="least important messages shown (default: %(default)s)")
    add(
        "--force",
        action="store_true",
        help="replace the result file even if this tool did not write it",
    )
    options.add_calibration(parser)
    add_ignored(parser, OF_QUANTIZATION)
    return parser


def _add_format(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--qformat",
        choices=FORMATS,
        required=True,
        help="quantization format; kv_cache: only the amax of keys and values, part of each format",
    )
    add(
        "--awq_block_size",
        type=int,
        choices=GROUP_SIZES,
        help="input features per scale, for int4_awq and int4_gptq (default: 128, or less if ranks "
        "would share a group)",
    )
    add(
        "--bits",
        type=float,
        help="bits per weight on average, scales included, for mixed: int4 in groups or int8 for "
        "each matrix. 8.1 allows int8 for every matrix; larger values change nothing",
    )
    add(
        "--scales",
        choices=get_args(ScaleChoice),
        default="amax",
        help="scales of int4_awq's groups: from their amax, as AMMO, or with the least squared "
        "error on the text (default: %(default)s)",
    )


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.quantize")
