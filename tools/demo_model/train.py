#!/usr/bin/env python3
"""Train the small MPT of resources/mpt-demo, and write its folder.

The model learns the sources and pydoc topics of a Python standard library. The folder contains the
model in transformers' format (float16), heldout.txt, training.json (all figures), README.md (the
model card, from the same figures) and the library's licence. One seed determines all random
choices. Different kinds of GPU round differently, so figures agree closely, but not exactly.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
import sysconfig
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser
from tools.demo_model.corpus import HELDOUT_BYTES, VALIDATION_BYTES
from tools.demo_model.recipe import Architecture, Recipe


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__.splitlines()[0],
        "tools/demo_model/train.py --output stage1",
    )
    add = parser.add_argument
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    output = REPOSITORY / "resources" / "mpt-demo"
    add("--stdlib", type=Path, default=stdlib, help="standard library (default: this Python's)")
    add("--python_version", default=platform.python_version(), help="its version (default: same)")
    add("--output", type=Path, default=output, help="model folder to write (default: %(default)s)")
    add("--initial", type=Path, help="model folder of an earlier run to train further")
    add_number(parser, "heldout_bytes", HELDOUT_BYTES, "bytes held out for the figures")
    add_number(parser, "validation_bytes", VALIDATION_BYTES, "bytes held out for choices")
    for field in dataclasses.fields(Architecture) + dataclasses.fields(Recipe):
        add_number(parser, field.name, field.default, field.name.replace("_", " "))
    return parser


def add_number(parser: argparse.ArgumentParser, name: str, default: Any, text: str) -> None:
    """Adds an option of the default's type."""
    parser.add_argument(
        f"--{name}", type=type(default), default=default, help=f"{text} (default: %(default)s)"
    )


if __name__ == "__main__":
    run_command(make_parser, "tools.demo_model.make")
