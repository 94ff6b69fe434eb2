#!/usr/bin/env python3
"""Build the TensorRT plan of one rank, rank{r}.engine, from its network.

Also writes its description, rank{r}.engine.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/steps/build_rank.py --network_dir my_networks --rank 0 --output_dir "
        "my_plans",
    )
    parser.add_argument(
        "--network_dir", type=Path, required=True, help="folder that make_networks.py made"
    )
    parser.add_argument(
        "--rank", type=int, default=0, help="number of the rank (default: %(default)s)"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="folder to write the plan to; other plans in it stay",
    )
    options.add_builder(parser)
    options.add_trust(parser)
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.build_rank")
