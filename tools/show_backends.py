#!/usr/bin/env python3
"""Shows what each backend can do, as a markdown table.

With --update it writes the table into a markdown file, between the two lines that mark its place.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli.console import run_cli
from mpt_trt.engines.backend_support import table
from tools.markdown import replace_between_marks


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", type=Path, metavar="FILE", help="write the table into FILE")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.update is None:
        print(table())
    else:
        replace_between_marks(arguments.update, table())


if __name__ == "__main__":
    run_cli(main)
