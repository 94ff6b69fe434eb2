#!/usr/bin/env python3
"""Print the result of a smoke test, and fail if the engine is too far from the reference."""

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
        "workflow_scripts/steps/check_smoke_test.py "
        "--measured build/smoke_tests/mpt-demo/fp16/1-gpu.json",
    )
    parser.add_argument(
        "--measured", type=Path, required=True, help="JSON file that smoke_test.py wrote"
    )
    parser.add_argument(
        "--variant", help="variant of config.yaml whose tolerance was used, for the message"
    )
    parser.add_argument("--output", type=Path, help="copy of the file, made if the engine passed")
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.check_smoke_test")
