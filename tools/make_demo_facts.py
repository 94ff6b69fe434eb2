#!/usr/bin/env python3
"""Compute facts about the demo model with transformers, and write its tasks and facts.json.

Engines are compared with them by `snakemake proofs/mpt-demo.json`. No code of mpt-trt computes the
figures: transformers runs the model, and scores of tasks are those of lm-eval's own `hf` model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from mpt_trt.cli.console import run_cli
from mpt_trt.cli.parser import tool_parser
from mpt_trt.system.replace import replace_file
from tools.demo_facts import demo_facts
from tools.demo_tasks import write_tasks

MODEL = REPOSITORY / "resources" / "mpt-demo"


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, "tools/make_demo_facts.py")
    parser.add_argument(
        "--model_dir", type=Path, default=MODEL, help="the demo model (default: %(default)s)"
    )
    return parser


def main() -> None:
    folder = make_parser().parse_args().model_dir
    heldout = (folder / "heldout.txt").read_text(encoding="utf-8")
    write_tasks(heldout, folder / "tasks")
    content = {"facts": demo_facts(folder, heldout)}
    with replace_file(folder / "facts.json") as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_cli(main)
