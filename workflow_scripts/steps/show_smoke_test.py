#!/usr/bin/env python3
"""Print the result of a smoke test."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/steps/show_smoke_test.py my_smoke_test.json",
    )
    parser.add_argument("result", type=Path, help="JSON file that smoke_test.py wrote")
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.show_smoke_test")
