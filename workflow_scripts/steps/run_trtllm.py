#!/usr/bin/env python3
"""Continue a prompt with TensorRT-LLM's runtime, and record tokens, logits and times.

Runs in TensorRT-LLM's environment, one process per rank: `mpirun -n 2 python run_trtllm.py ...`.
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
        "workflow_scripts/steps/run_trtllm.py --engine_dir my_trtllm_engine --prompt "
        "my_prompt.json --max_output_len 32 --output my_generation.npz",
    )
    add = parser.add_argument
    add("--engine_dir", type=Path, required=True, help="engine directory that build_trtllm.py made")
    add("--prompt", type=Path, required=True, help="JSON file that encode_prompt.py wrote")
    add(
        "--max_output_len", type=int, required=True, help="number of tokens to generate, at least 2"
    )
    add("--output", type=Path, required=True, help="npz file of the result")
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.run_trtllm")
