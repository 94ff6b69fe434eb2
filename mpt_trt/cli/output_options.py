"""What tools share about their outputs; it needs no library."""

from __future__ import annotations

import argparse
from pathlib import Path

# Options that name a file or folder, or a hub id, that a tool reads.
INPUT_OPTIONS = (
    "adapter",
    "chat_template",
    "engine_dir",
    "generation",
    "input_file",
    "model_dir",
    "reference",
    "text",
    "tokenizer_dir",
)


def input_paths(options: argparse.Namespace) -> list[Path]:
    """What a tool reads, which none of its output files may replace; hub ids are no paths here."""
    values = [getattr(options, name, None) for name in INPUT_OPTIONS]
    return [Path(value) for value in values if value is not None]


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets an output folder replace any other folder."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace the output folder even if it holds files that this tool did not write; an "
        "input is never replaced",
    )
