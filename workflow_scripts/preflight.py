#!/usr/bin/env python3
"""Shows what this machine has, and which targets can be built and run on it.

    snakemake preflight

calls it for the targets of config.yaml, and jobs that use GPUs call it before the first of them
starts on a machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli.console import run_command


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--needs", default="[]", help="JSON list of targets and what they need, from the workflow"
    )
    parser.add_argument(
        "--once",
        type=Path,
        metavar="FOLDER",
        help="record what was found in FOLDER/{host}.json; do nothing where that is there already",
    )
    return parser


if __name__ == "__main__":
    run_command(make_parser(), "mpt_trt.commands.preflight")
