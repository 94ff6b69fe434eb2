#!/usr/bin/env python3
"""Run a command with GPUs that no other job on this machine uses.

It waits until enough GPUs are free, and passes them to the command in CUDA_VISIBLE_DEVICES. They
become free again when the command and its child processes have ended, for any reason. It fails
at once if the machine has fewer GPUs. --gpus 0 hides all GPUs from the command.

It chooses from the GPUs in CUDA_VISIBLE_DEVICES, which SLURM sets in its jobs. Without that
variable, it chooses from all GPUs that the driver finds, or from the number in MPT_TRT_GPUS.
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
        "workflow_scripts/steps/with_gpus.py --gpus 1 -- nvidia-smi",
    )
    parser.add_argument("--gpus", type=_count, required=True, help="number of GPUs")
    parser.add_argument("command", nargs="+", help="the command and its arguments, after --")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GPUs")
    return int(text)


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.with_gpus")
