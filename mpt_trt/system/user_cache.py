"""The user's cache folder, whose content can be made again."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mpt_trt.errors import MptTrtError

REMEDY = "set XDG_CACHE_HOME to a folder of your own"


def user_cache_folder() -> Path | None:
    """The folder `mpt-trt` in the user's cache, which may not exist; None without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification requires relative paths to be ignored.
        base = Path(named) if named.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "mpt-trt"


def own_cache_folder() -> Path:
    """Returns the folder `mpt-trt` in the user's cache; makes it, with mode 0700, if necessary.

    Raises MptTrtError when it cannot be made or read, or others may write to it.
    """
    folder = user_cache_folder()
    if folder is None:
        raise MptTrtError(f"there is no home folder for a cache; {REMEDY}")
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.stat()
    except OSError as error:
        raise MptTrtError(f"{folder}: cannot be made ({error.strerror}); {REMEDY}") from None
    _require_own(folder, state, REMEDY)
    if state.st_mode & 0o500 != 0o500:
        raise MptTrtError(f"{folder}: you may not read it; chmod u+rwx {folder}")
    return folder


def require_own_file(path: Path) -> None:
    """Raises MptTrtError unless a file in the cache is a regular one that only its user may change.

    Raises FileNotFoundError when it does not exist.
    """
    state = path.lstat()
    if not stat.S_ISREG(state.st_mode):
        raise MptTrtError(f"{path}: not a regular file; delete it")
    _require_own(path, state, "delete it")


def _require_own(path: Path, state: os.stat_result, remedy: str) -> None:
    if state.st_uid != os.geteuid():
        raise MptTrtError(f"{path}: belongs to another user; {remedy}")
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise MptTrtError(f"{path}: other users may write to it; chmod go-w {path}")
