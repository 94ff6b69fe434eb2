#!/usr/bin/env python3
"""Seals a finished folder: writes the list of its files beside it, so that damage is noticed."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpt_trt.console import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder to seal")
    arguments = parser.parse_args()
    from mpt_trt.seals import write_seal

    write_seal(arguments.folder)


if __name__ == "__main__":
    run_cli(main)
