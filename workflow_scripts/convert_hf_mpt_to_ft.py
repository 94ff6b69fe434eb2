#!/usr/bin/env python3
"""Convert a Hugging Face MPT checkpoint to a FasterTransformer (FT) checkpoint.

Writes {out_dir}/{tensor_parallelism}-gpu, and replaces an FT checkpoint there. If that is of
another model or type, it is named. Only --force replaces other folders.

With -sq or -kv, it first runs the model over samples of a calibration text, one block at a time.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import calibration_options as options
from mpt_trt.cli import model_options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.ignored_options import OF_CONVERSION, add_ignored
from mpt_trt.cli.output_options import add_force
from mpt_trt.cli.parser import tool_parser
from mpt_trt.model.config import DTYPES


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/convert_hf_mpt_to_ft.py -i resources/mpt-demo -o my_ft/fp16 -t float16",
    )
    parser.add_argument(
        "-i", "--in_file", "--in-file", required=True, help="hub id or folder of the checkpoint"
    )
    parser.add_argument(
        "-o", "--out_dir", "--out-dir", type=Path, required=True, help="folder of the result"
    )
    parser.add_argument(
        "-tp",
        "--tensor_parallelism",
        "--tensor-parallelism",
        # FasterTransformer's name for it, which NVIDIA's example mentions.
        "--infer_gpu_num",
        type=int,
        default=1,
        help="tensor-parallel size (default: %(default)s)",
    )
    parser.add_argument(
        "-t",
        "--storage_type",
        "--storage-type",
        choices=DTYPES,
        default="float16",
        help="data type of the stored weights (default: %(default)s)",
    )
    parser.add_argument(
        "-p",
        "--processes",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="number of tensors converted at a time (default: %(default)s)",
    )
    model_options.add_adapter(parser)
    model_options.add_revision(parser)
    _add_int8(parser)
    add_force(parser)
    add_ignored(parser, OF_CONVERSION)
    options.add_calibration(parser)
    return parser


def _add_int8(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-sq",
        "--smoothquant",
        type=float,
        metavar="ALPHA",
        help="write a SmoothQuant checkpoint: smoothed weights, int8 weights and scales. ALPHA is "
        "the migration strength, 0 to 1; 0.5 is a good start",
    )
    parser.add_argument(
        "-kv",
        "--calibrate_kv_cache",
        "--calibrate-kv-cache",
        action="store_true",
        help="also write the scales of an int8 KV cache, for readers of FT checkpoints (build.py "
        "takes them from the result of quantize.py)",
    )


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.convert_hf_mpt_to_ft")
