"""The option about outputs that several tools share; it needs no library."""

from __future__ import annotations

import argparse


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets an output folder replace any other folder."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace the output folder even if it holds files that this tool did not write; an "
        "input is never replaced",
    )
