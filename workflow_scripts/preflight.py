#!/usr/bin/env python3
"""Show what this machine has, and which targets it can build and run.

    snakemake preflight

runs it for the targets of config.yaml. The first job that uses GPUs on a machine also runs it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/preflight.py",
    )
    parser.add_argument(
        "--needs",
        default="[]",
        help="JSON list of targets and their requirements, from the workflow",
    )
    parser.add_argument(
        "--once",
        type=Path,
        metavar="FOLDER",
        help="write the result to FOLDER/{host}.json; do nothing if that file exists",
    )
    return parser


if __name__ == "__main__":
    run_command(make_parser(), "mpt_trt.commands.preflight")
