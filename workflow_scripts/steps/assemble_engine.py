#!/usr/bin/env python3
"""Assemble an engine directory from the networks and plans of all ranks, by hard links."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.output_options import add_force
from mpt_trt.cli.parser import tool_parser


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/steps/assemble_engine.py --network_dir my_networks --plan_dir "
        "my_plans --output_dir my_engine",
    )
    parser.add_argument(
        "--network_dir", type=Path, required=True, help="folder that make_networks.py made"
    )
    parser.add_argument(
        "--plan_dir", type=Path, required=True, help="folder with all plans of build_rank.py"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="the engine directory")
    options.add_trust(parser)
    add_force(parser)
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.assemble_engine")
