#!/usr/bin/env python3
"""Seals a finished folder: writes the list of its files beside it, so that damage is noticed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli.console import run_command


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder to seal")
    return parser


if __name__ == "__main__":
    run_command(make_parser(), "mpt_trt.commands.seal")
