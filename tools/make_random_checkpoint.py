#!/usr/bin/env python3
"""Write an MPT checkpoint of a known model's shape with random weights, for tests and benchmarks.

Weights are made and written one file at a time, so a small machine can make a full MPT-7B.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.checkpoint.known_models import SHAPES
from mpt_trt.cli.console import run_command
from mpt_trt.cli.output_options import add_force
from mpt_trt.cli.parser import tool_parser
from mpt_trt.model.config import DTYPES


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "tools/make_random_checkpoint.py --like mpt-7b --layers 2 --output_dir my_random_mpt",
    )
    parser.add_argument("--like", choices=SHAPES, required=True, help="model whose shape to use")
    parser.add_argument("--layers", type=int, help="number of blocks (default: the model's)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float16",
        help="type of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the weights (default: %(default)s)"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the result")
    add_force(parser)
    return parser


if __name__ == "__main__":
    run_command(make_parser, "tools.random_checkpoint")
