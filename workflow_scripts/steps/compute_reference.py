#!/usr/bin/env python3
"""Compute the float32 reference on held-out text, for measurements of quality.

Writes the windows of the text, and the hidden states that the reference's head reads, as
safetensors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import model_options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser
from mpt_trt.workflow.settings import parse_settings


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/steps/compute_reference.py --model_dir resources/mpt-demo --output "
        "my_reference.safetensors",
    )
    usual = parse_settings({}).quality
    model_options.add_checkpoint(parser)
    model_options.add_checkpoint_tokenizer(parser)
    model_options.add_adapter(parser)
    model_options.add_revision(parser)
    parser.add_argument(
        "--text", type=Path, default=Path(usual.text), help="UTF-8 file (default: %(default)s)"
    )
    parser.add_argument(
        "--num_windows",
        type=int,
        default=usual.num_windows,
        help="maximum number of windows, spread evenly over the text (default: %(default)s)",
    )
    parser.add_argument(
        "--window_length",
        type=int,
        default=usual.window_length,
        help="tokens per window (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.compute_reference")
