#!/usr/bin/env python3
"""Seals a finished folder: writes the list of its files beside it, so that damage is noticed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli.console import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder to seal")
    arguments = parser.parse_args()
    from mpt_trt.workflow.seals import write_seal

    write_seal(arguments.folder)


if __name__ == "__main__":
    run_cli(main)
