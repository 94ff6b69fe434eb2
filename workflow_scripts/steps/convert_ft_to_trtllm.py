#!/usr/bin/env python3
"""Convert an FT checkpoint to a checkpoint of TensorRT-LLM 0.20 to 1.2.1.

Writes config.json and one rank{r}.safetensors per rank of the FT checkpoint.

int4_awq, fp8 and 8-bit KV caches need the result of quantize.py. So does smoothquant with
per_channel and without per_token (--qformat int8_sq). smoothquant with other settings needs an FT
checkpoint that was converted with -sq.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import model_options, options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.output_options import add_force
from mpt_trt.cli.parser import tool_parser


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/steps/convert_ft_to_trtllm.py --model_dir my_ft/fp16/1-gpu "
        "--output_dir my_trtllm_checkpoint",
    )
    model_options.add_ft_checkpoint(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the result")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="number of ranks written at a time (default: %(default)s)",
    )
    add_force(parser)
    options.add_vocabulary(parser)
    options.add_quantization(parser)
    options.add_calibration_result(parser)
    options.add_trust(parser)
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.convert_ft_to_trtllm")
