"""Says how a path is shown to a user."""

from __future__ import annotations

from pathlib import Path


def seen_from(folder: Path, path: Path) -> str:
    """The path relative to `folder` if it lies in it; otherwise the path as it is."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
