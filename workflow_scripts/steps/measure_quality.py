#!/usr/bin/env python3
"""Measure how well an engine predicts held-out text, compared with the float32 reference.

Writes perplexity, KL divergence and top-1 agreement, the engine's size and its speed, as JSON; if
asked for, also word and byte perplexity of a whole text, and scores of lm-eval's tasks.
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
        "workflow_scripts/steps/measure_quality.py --engine_dir my_engine --model_dir "
        "resources/mpt-demo --reference my_reference.safetensors --output my_quality.json",
    )
    parser.add_argument("--engine_dir", type=Path, required=True, help="the engine directory")
    model_options.add_checkpoint(parser)
    model_options.add_merged_adapter(parser)
    model_options.add_revision(parser)
    parser.add_argument(
        "--reference", type=Path, required=True, help="file that compute_reference.py wrote"
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="text file whose word and byte perplexity is measured as a whole (default: none)",
    )
    model_options.add_engine_tokenizer(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks of lm-eval, whose data must be on this machine; needs the extra lm_eval",
    )
    parser.add_argument(
        "--task_dir",
        type=Path,
        metavar="FOLDER",
        help="task files (YAML) in addition to lm-eval's own; relative paths in them start there",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    options.add_runtime(parser)
    options.add_total_threads(parser)
    return parser


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(make_parser, "mpt_trt.commands.measure_quality")
