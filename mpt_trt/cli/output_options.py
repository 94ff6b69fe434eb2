"""Options and checks of tools' outputs, without imports of libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

# Options that name an input: a file, a folder or a hub id.
INPUT_OPTIONS = (
    "adapter",
    "chat_template",
    "engine_dir",
    "generation",
    "input_file",
    "model_dir",
    "reference",
    "task_dir",
    "text",
    "tokenizer_dir",
)


def input_paths(options: argparse.Namespace) -> list[Path]:
    """Lists a tool's inputs, which its outputs must not replace; hub ids are left out."""
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
