#!/usr/bin/env python3
"""Measure an engine's speed over batch sizes, prompt lengths and output lengths.

Prints and writes, for every combination, the time to the first token, the time between tokens
(median and 99th percentile), and tokens/s.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser
from mpt_trt.system.process import restart_with_huge_pages


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/benchmark_engine.py --engine_dir my_engine --batch_sizes 1 8 --output "
        "my_throughput.json",
    )
    parser.add_argument("--engine_dir", type=Path, required=True, help="the engine directory")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    group = parser.add_argument_group("loads")
    group.add_argument(
        "--batch_sizes",
        type=int,
        nargs="+",
        help="prompts at a time (default: 1 and the engine's maximum)",
    )
    group.add_argument(
        "--prompt_lens",
        type=int,
        nargs="+",
        default=[128],
        help="tokens per prompt (default: 128)",
    )
    group.add_argument(
        "--output_lens",
        type=int,
        nargs="+",
        default=[64],
        help="new tokens per prompt (default: 64)",
    )
    group.add_argument(
        "--rounds", type=int, default=5, help="measurements per load (default: %(default)s)"
    )
    options.add_runtime(parser)
    options.add_total_threads(parser)
    return parser


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(make_parser, "mpt_trt.commands.benchmark_engine")
