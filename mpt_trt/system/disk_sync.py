"""Waits until outputs are on disk, so that power failures lose none, if MPT_TRT_FSYNC is set."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# If set to 1, data is on disk before an output replaces another, so power failures lose neither.
SYNC_VARIABLE = "MPT_TRT_FSYNC"
SYNC_WORKERS = 8


def sync(path: Path) -> None:
    """Waits until a file, or a folder with its content, is on disk, if MPT_TRT_FSYNC is set."""
    if not _is_syncing():
        return
    paths = [path]
    if path.is_dir():
        walked = list(os.walk(path))
        names = [f"{root}/{name}" for root, _, files in walked for name in files]
        paths = [Path(name) for name in names + [root for root, _, _ in walked]]
    with ThreadPoolExecutor(SYNC_WORKERS) as pool:
        list(pool.map(_fsync, (each for each in paths if each.is_file() or each.is_dir())))


def sync_entry(path: Path) -> None:
    """Waits until the name of a file or folder is on disk, if MPT_TRT_FSYNC is set."""
    if _is_syncing():
        _fsync(path.parent)


def _is_syncing() -> bool:
    return os.environ.get(SYNC_VARIABLE, "") not in ("", "0")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
