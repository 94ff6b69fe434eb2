#!/usr/bin/env python3
"""Measure on an engine what published facts about its model say, and compare.

Fails if the engine differs from a fact. Facts about other kinds of engine are left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import model_options, options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser
from mpt_trt.system.process import restart_with_huge_pages


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/steps/measure_facts.py --engine_dir my_engine --facts "
        "resources/mpt-demo/facts.json --output my_facts.json",
    )
    parser.add_argument("--engine_dir", type=Path, required=True, help="the engine directory")
    parser.add_argument(
        "--facts",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="files of facts; docs/proofs.md describes them",
    )
    model_options.add_engine_tokenizer(parser)
    parser.add_argument(
        "--report_only",
        action="store_true",
        help="write what was measured, and do not print or compare it",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the measurements")
    options.add_runtime(parser)
    options.add_total_threads(parser)
    return parser


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(make_parser, "mpt_trt.commands.measure_facts")
