#!/usr/bin/env python3
"""Compare what measure_facts.py measured on engines of a model with published facts about it.

Prints every fact: passed, failed, or not checked, with the reason. Fails if an engine differs from
a fact, or if no fact could be checked.
"""

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
        "workflow_scripts/steps/check_facts.py --model mpt-demo --facts "
        "resources/mpt-demo/facts.json --measured my_facts.json",
    )
    parser.add_argument("--model", required=True, help="name of the model, for messages")
    parser.add_argument(
        "--facts",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="files of facts; docs/proofs.md describes them",
    )
    parser.add_argument(
        "--measured",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="files that measure_facts.py wrote, one per engine",
    )
    parser.add_argument("--output", type=Path, help="JSON file of the result, if nothing failed")
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.check_facts")
