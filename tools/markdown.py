"""Reads and writes generated parts of Markdown documents, between two marking lines."""

from __future__ import annotations

from pathlib import Path

from mpt_trt.errors import MptTrtError
from mpt_trt.system.replace import replace_file

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def replace_between_marks(path: Path, content: str) -> None:
    """Replace the text between the lines BEGIN and END.

    Raises MptTrtError when the file does not have them.
    """
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MptTrtError(f"{path}: lines {BEGIN} and {END} are expected")
    with replace_file(path) as partial:
        partial.write_text(f"{before}{BEGIN}\n\n{content}\n{END}{after}")


def between_marks(path: Path) -> str:
    """Text between the lines BEGIN and END, without surrounding white space."""
    return path.read_text().partition(BEGIN)[2].partition(END)[0].strip()
