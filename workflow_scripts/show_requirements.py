#!/usr/bin/env python3
"""Show the disk space, host memory and GPU memory that an engine needs.

docs/requirements.md has tables of all predefined models.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser
from mpt_trt.workflow.settings import variant_choices, variant_default


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/show_requirements.py --like mpt-7b --quantization int4_awq -tp 2",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model_dir", type=Path, help="folder of a Hugging Face checkpoint")
    options.add_known_model(model)
    parser.add_argument(
        "--dtype",
        choices=variant_choices("dtype"),
        default=variant_default("dtype"),
        help="data type of weights, activations and KV cache (default: %(default)s)",
    )
    parser.add_argument(
        "-tp",
        "--tensor_parallelism",
        type=int,
        default=1,
        help="tensor-parallel size (default: %(default)s)",
    )
    options.add_limits(parser)
    options.add_vocabulary(parser)
    options.add_quantization(parser)
    return parser


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.show_requirements")
