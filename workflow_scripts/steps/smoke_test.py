#!/usr/bin/env python3
"""Run an engine and compare its logits with the float32 reference.

Writes the result as JSON and prints it. If the engine is further from the reference than its type
and quantization explain, the exit status is 1.
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
from mpt_trt.workflow.settings import parse_settings


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/steps/smoke_test.py --engine_dir my_engine --model_dir "
        "resources/mpt-demo --output my_smoke_test.json",
    )
    parser.add_argument("--engine_dir", type=Path, required=True, help="the engine directory")
    model_options.add_checkpoint(parser)
    model_options.add_merged_adapter(parser)
    model_options.add_checkpoint_tokenizer(parser)
    model_options.add_revision(parser)
    usual = parse_settings({}).smoke_test
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    parser.add_argument(
        "--prompt",
        default=usual.prompt,
        help="text that the engine continues (default: %(default)s)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=usual.max_new_tokens,
        help="number of tokens to generate (default: %(default)s)",
    )
    options.add_tolerance(parser)
    options.add_report_only(parser)
    options.add_runtime(parser)
    options.add_total_threads(parser)
    return parser


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(make_parser, "mpt_trt.commands.smoke_test")
