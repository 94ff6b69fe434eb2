#!/usr/bin/env python3
"""Measure llama.cpp's quantizations of a model on held-out text, for the report.

Needs the packages of the extra `frontier`: llama-cpp-python and gguf.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import model_options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/steps/measure_llama_cpp.py --model_dir resources/mpt-demo --reference "
        "my_reference.safetensors --output my_llama_cpp.json",
    )
    model_options.add_checkpoint(parser)
    model_options.add_adapter(parser)
    model_options.add_revision(parser)
    parser.add_argument(
        "--reference", type=Path, required=True, help="file that compute_reference.py wrote"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.measure_llama_cpp")
