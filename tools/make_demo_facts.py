#!/usr/bin/env python3
"""Compute facts about the demo model with transformers, and write its tasks and facts.json.

Engines are compared with them by `snakemake proofs/mpt-demo.json`. No code of mpt-trt computes the
figures: transformers runs the model, and scores of tasks are those of lm-eval's own `hf` model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser

MODEL = REPOSITORY / "resources" / "mpt-demo"


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, "tools/make_demo_facts.py")
    parser.add_argument(
        "--model_dir", type=Path, default=MODEL, help="the demo model (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    run_command(make_parser, "tools.demo_facts")
