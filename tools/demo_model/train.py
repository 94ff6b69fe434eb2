#!/usr/bin/env python3
"""Train the small MPT that ships in resources/mpt-demo, and write its whole folder.

The model learns the sources and pydoc topics of a Python standard library. The folder has the model
as transformers reads it (float16), heldout.txt, training.json (every figure), README.md (the model
card, from the same figures) and the library's licence. One seed fixes everything random. Different
kinds of GPU round differently, so figures agree closely, but not exactly.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from mpt_trt.cli.console import run_command
from tools.demo_model.corpus import HELDOUT_BYTES, VALIDATION_BYTES
from tools.demo_model.recipe import Architecture, Recipe


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    output = REPOSITORY / "resources" / "mpt-demo"
    add("--stdlib", type=Path, default=stdlib, help="folder of the standard library to learn")
    add("--python_version", default=platform.python_version(), help="whose library that is")
    add("--output", type=Path, default=output, help="model folder to write")
    add("--initial", type=Path, help="model folder of this script to train on, its sizes kept")
    add("--heldout_bytes", type=int, default=HELDOUT_BYTES, help="text held out for the figures")
    add("--validation_bytes", type=int, default=VALIDATION_BYTES, help="text held out for choices")
    for field in dataclasses.fields(Architecture) + dataclasses.fields(Recipe):
        add(f"--{field.name}", type=type(field.default), default=field.default, help=" ")
    return parser


if __name__ == "__main__":
    run_command(make_parser(), "tools.demo_model.make")
