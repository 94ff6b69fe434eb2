"""Checks file names that a file in a folder lists: they must stay in that folder."""

from __future__ import annotations

import os
from pathlib import Path

from mpt_trt.errors import MptTrtError
from mpt_trt.system.json_text import shown

MOST_CHARACTERS = 1000


def require_inner_name(name: str) -> None:
    """Raises ValueError unless `name` is a relative path below a folder."""
    parts = name.split("/")
    is_printable = name.isprintable() and len(name) <= MOST_CHARACTERS
    if not is_printable or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{shown(name)} is not the name of a file in this folder")


def inner_path(folder: Path, name: str, named_by: Path) -> Path:
    """Path of the file `name` in `folder`.

    named_by: the file that lists the name.

    Raises MptTrtError, naming that file, when the name or a link in its path leads outside.
    """
    try:
        require_inner_name(name)
    except ValueError as error:
        raise MptTrtError(f"{named_by}: {error}; it is damaged or cannot be trusted") from None
    path = folder / name
    top = os.path.realpath(folder)
    if os.path.commonpath([top, os.path.realpath(path)]) != top:
        raise MptTrtError(
            f"{path}: a link that leads outside of {folder}, though {named_by.name} names it as a "
            "file there; replace it with the file itself"
        )
    return path
