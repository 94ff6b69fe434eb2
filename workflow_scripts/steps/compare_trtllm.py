#!/usr/bin/env python3
"""Compare the generation that run_trtllm.py recorded with the float32 reference.

The result has the format of smoke_test.py's and covers only the generated tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import model_options, options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser
from mpt_trt.model.config import DTYPES
from mpt_trt.workflow.settings import variant_default


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/steps/compare_trtllm.py --engine_dir my_trtllm_engine --generation "
        "my_generation.npz --model_dir resources/mpt-demo --output my_smoke_test.json",
    )
    parser.add_argument("--engine_dir", type=Path, required=True, help="the engine directory")
    parser.add_argument(
        "--generation", type=Path, required=True, help="npz file that run_trtllm.py wrote"
    )
    model_options.add_checkpoint(parser)
    model_options.add_merged_adapter(parser)
    model_options.add_checkpoint_tokenizer(parser)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    options.add_tolerance(parser)
    options.add_report_only(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=variant_default("dtype"),
        help="data type of the engine (default: %(default)s)",
    )
    options.add_quantization(parser)
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.compare_trtllm")
