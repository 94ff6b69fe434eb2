"""The argument parser of a tool, whose `--help` ends with an example."""

from __future__ import annotations

import argparse


class ParagraphFormatter(argparse.HelpFormatter):
    """Wraps each paragraph of a description on its own, and keeps examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(
            paragraph if "\n    " in paragraph else fill(paragraph, width, indent)
            for paragraph in text.strip().split("\n\n")
        )


def tool_parser(description: str | None, example: str) -> argparse.ArgumentParser:
    """Makes a parser without options.

    description: the script's docstring. example: a command line that works, from the script's path.
    """
    return argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n    python {example}",
        formatter_class=ParagraphFormatter,
    )
