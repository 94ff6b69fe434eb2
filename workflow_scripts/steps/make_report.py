#!/usr/bin/env python3
"""Write a page that compares a model's engines, from their quality and smoke test results.

The page is a single HTML file. Its table (CSV) and plots (SVG) are also written as files.
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
        "workflow_scripts/steps/make_report.py --model mpt-demo --variants fp16 --quality "
        "my_quality.json --smoke_tests my_smoke_test.json --output my_report.html --items_dir "
        "my_report",
    )
    parser.add_argument("--model", required=True, help="name of the model, for the title")
    group = parser.add_argument_group(
        "engines, in the order of the table; give one value of each option per engine"
    )
    group.add_argument("--variants", nargs="+", required=True, help="names of the variants")
    group.add_argument(
        "--quality", nargs="+", type=Path, required=True, help="files of measure_quality.py"
    )
    group.add_argument(
        "--smoke_tests", nargs="+", type=Path, required=True, help="files of smoke_test.py"
    )
    group.add_argument(
        "--throughput",
        nargs="*",
        type=Path,
        default=[],
        help="files of benchmark_engine.py, for a plot of speed under load (default: none)",
    )
    parser.add_argument(
        "--facts",
        nargs="*",
        type=Path,
        default=[],
        metavar="FILE",
        help="files of published facts to compare the engines with (default: none)",
    )
    parser.add_argument(
        "--measured_facts",
        nargs="*",
        type=Path,
        default=[],
        metavar="FILE",
        help="files of measure_facts.py, one per engine",
    )
    parser.add_argument(
        "--llama_cpp", nargs="*", type=Path, default=[], help="file of measure_llama_cpp.py, if any"
    )
    parser.add_argument(
        "--template", type=Path, help="Jinja template of the page (default: the one that ships)"
    )
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--items_dir", type=Path, required=True, help="folder of table and plots")
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.make_report")
