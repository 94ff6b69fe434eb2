#!/usr/bin/env python3
"""Build an engine directory from a TensorRT-LLM checkpoint with TensorRT-LLM's trtllm-build.

Runs in TensorRT-LLM's environment (0.20 to 1.2.1), on the GPUs that the engine will run on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli.console import run_command
from mpt_trt.cli.output_options import add_force
from mpt_trt.cli.parser import tool_parser


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/steps/build_trtllm.py --checkpoint_dir my_trtllm_checkpoint "
        "--output_dir my_trtllm_engine --max_batch_size 8 --max_input_len 512 "
        "--max_output_len 64 --show",
    )
    add = parser.add_argument
    add(
        "--checkpoint_dir",
        type=Path,
        required=True,
        help="folder that convert_ft_to_trtllm.py wrote",
    )
    add("--output_dir", type=Path, required=True, help="the engine directory")
    add_force(parser)
    add("--max_batch_size", type=int, required=True, help="maximum batch size")
    add("--max_input_len", type=int, required=True, help="maximum number of tokens per prompt")
    add("--max_output_len", type=int, required=True, help="maximum number of new tokens per prompt")
    add(
        "--gather_all_token_logits",
        action="store_true",
        help="return the logits of every prompt token",
    )
    add(
        "--workers",
        type=int,
        default=1,
        help="number of ranks built at a time (default: %(default)s)",
    )
    add("--show", action="store_true", help="only print the command line of trtllm-build")
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.build_trtllm")
