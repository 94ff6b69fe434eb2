"""The user's cache folder, whose content can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder() -> Path | None:
    """The folder `mpt-trt` in the user's cache, which may not exist; None without a home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification requires relative paths to be ignored.
        base = Path(named) if named.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "mpt-trt"
