"""Paths of the repository's files, for tests."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "tests" / "data"
SCRIPTS = REPOSITORY / "workflow_scripts"
FOLDERS = (SCRIPTS, SCRIPTS / "steps", REPOSITORY / "tools")


def tool_path(name: str) -> Path:
    """Finds the path of a command by its file name."""
    (path,) = (folder / name for folder in FOLDERS if (folder / name).exists())
    return path
