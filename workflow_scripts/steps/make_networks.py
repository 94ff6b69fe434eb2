#!/usr/bin/env python3
"""Write the networks of all ranks: one rank{r}.onnx per rank, and their weights.

Unquantized weights are hard links to the FT files; quantized weights are written here.
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
        "workflow_scripts/steps/make_networks.py --model_dir my_ft/fp16/1-gpu --output_dir "
        "my_networks",
    )
    model_options.add_ft_checkpoint(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the result")
    add_force(parser)
    options.add_limits(parser)
    options.add_vocabulary(parser)
    options.add_quantization(parser)
    options.add_calibration_result(parser)
    options.add_trust(parser)
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.make_networks")
