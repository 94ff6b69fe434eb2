#!/usr/bin/env python3
"""Write a prompt and its tokens as JSON."""

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
        "workflow_scripts/steps/encode_prompt.py --model_dir resources/mpt-demo --prompt "
        '"def fibonacci" --output my_prompt.json',
    )
    model_options.add_checkpoint(parser)
    model_options.add_checkpoint_tokenizer(parser)
    parser.add_argument("--prompt", required=True, help="the text")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.encode_prompt")
