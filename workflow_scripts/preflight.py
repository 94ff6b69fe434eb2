#!/usr/bin/env python3
"""Show what this machine has, and which targets it can build and run.

Name targets, or a model and a variant of config.yaml. `snakemake preflight` checks the targets of
config.yaml. The workflow also runs this check before its first GPU job on a machine.
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
        "workflow_scripts/preflight.py --model mpt-7b --variant fp16",
    )
    parser.add_argument(
        "targets", nargs="*", help="targets of engines, such as trt_engines/mpt-7b/fp16/1-gpu"
    )
    parser.add_argument("--model", help="a model of config.yaml, with --variant")
    parser.add_argument("--variant", help="a variant of config.yaml, with --model")
    parser.add_argument(
        "-tp",
        "--tensor_parallelism",
        type=int,
        default=1,
        help="tensor-parallel size, with --model (default: %(default)s)",
    )
    parser.add_argument(
        "--configfile",
        type=Path,
        help="configuration (default: config.yaml here or, if there is none, the one that ships)",
    )
    parser.set_defaults(repository=REPOSITORY)
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
    run_command(make_parser, "mpt_trt.commands.preflight")
