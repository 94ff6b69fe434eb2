#!/usr/bin/env python3
"""Write the one-node ONNX models with which mpt_trt.arrays casts and transposes arrays.

They are files of the package, so that a conversion need not import `onnx`, which takes 0.1 s.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "tools/make_kernels.py --output_dir my_kernels",
    )
    folder = REPOSITORY / "mpt_trt" / "arrays" / "kernels"
    parser.add_argument(
        "--output_dir", type=Path, default=folder, help="folder (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    run_command(make_parser, "tools.kernels")
