"""The argument parser of a tool, whose `--help` ends with an example."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn


class ParagraphFormatter(argparse.HelpFormatter):
    """Wraps each paragraph of a description on its own, and keeps examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(
            paragraph if "\n    " in paragraph else fill(paragraph, width, indent)
            for paragraph in text.strip().split("\n\n")
        )


class ToolParser(argparse.ArgumentParser):
    """Rejects empty paths, such as those of unset shell variables, and expands `~` in paths.

    Errors are one line, like those of the command itself, without the list of all options.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; name a file or folder")
    # Unlike Path.expanduser, this leaves the name of an unknown user as it is.
    return Path(os.path.expanduser(text))  # noqa: PTH111


def tool_parser(description: str | None, example: str) -> ToolParser:
    """Makes a parser without options.

    description: the script's docstring. example: a command line that works, from the script's path.
    """
    return ToolParser(
        description=description,
        epilog=f"example:\n    python {example}",
        formatter_class=ParagraphFormatter,
    )
