#!/usr/bin/env python3
"""Builds the TensorRT plans of all ranks, rank{r}.engine of each, from their networks.

Plans that are finished when it fails or is interrupted are kept, beside the output, for the next
run with the same arguments.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import options
from mpt_trt.cli.console import run_command


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--network_dir", type=Path, required=True, help="folder that make_networks.py made"
    )
    parser.add_argument(
        "--at_once",
        type=int,
        default=1,
        help="ranks to build at a time; each needs the memory of one rank (default: %(default)s)",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the result")
    options.add_builder(parser)
    return parser


if __name__ == "__main__":
    run_command(make_parser(), "mpt_trt.commands.build_plans")
