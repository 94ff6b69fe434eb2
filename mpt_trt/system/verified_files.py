"""Compares files with the hashes that were recorded when they were made, each file once.

Compared files are remembered in the user's cache folder, by device, inode, size and time of the
last change. Without that memory, or if others may write to it, files are read again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import content_hashes, read_small_file
from mpt_trt.system.json_text import MOST_BYTES
from mpt_trt.system.replace import replace_file
from mpt_trt.system.user_cache import own_cache_folder, require_own_file

FILE_NAME = "content_hashes.json"
MOST_ENTRIES = 50_000
# A file that changes twice within the clock's resolution keeps the same time (ext4: 4 ms; NFS: up
# to a second).
RACY_NS = 2_000_000_000

Memory = dict[str, list[int | str]]
"""Size in bytes, time of the last change in ns since 1970 and content hash, by device and inode."""


def require_recorded(
    folder: Path, hashes: Mapping[str, str], recorded_by: Path, remedy: str
) -> None:
    """Compares files of `folder` with the given hashes, unless they are remembered.

    hashes: by name in the folder. recorded_by, remedy: the file that records them, and the remedy,
    for error messages.

    Raises MptTrtError, naming the file, when the content of one differs.
    """
    memory = _read_memory()
    identities = {name: _identity(folder / name) for name in hashes}
    unknown = {
        name: folder / name
        for name, (key, *state) in identities.items()
        if memory.get(str(key)) != [*state, hashes[name]]
    }
    if not unknown:
        return
    contents = content_hashes(unknown)
    for name, content in contents.items():
        if content != hashes[name]:
            raise MptTrtError(
                f"{folder / name}: not the file that {recorded_by.name} describes, but damaged or "
                f"of another build; {remedy}"
            )
    now = time.time_ns()
    _remember(
        {
            str(key): [size, changed_ns, contents[name]]
            for name, (key, size, changed_ns) in identities.items()
            if name in contents and changed_ns + RACY_NS < now
        }
    )


def remember_written(folder: Path, hashes: Mapping[str, str]) -> None:
    """Remembers the content of files that this program has just written to `folder`.

    Hard links are left out, because they are existing files.
    """
    with contextlib.suppress(MptTrtError, OSError):
        own = [name for name in hashes if (folder / name).stat().st_nlink == 1]
        states = {name: _identity(folder / name) for name in own}
        _remember({str(key): [size, ns, hashes[name]] for name, (key, size, ns) in states.items()})


def _identity(path: Path) -> tuple[str, int, int]:
    try:
        state = path.stat()
    except FileNotFoundError:
        raise MptTrtError(f"{path}: no such file") from None
    except OSError as error:
        raise MptTrtError(f"{path}: cannot be read: {error}") from None
    return f"{state.st_dev}:{state.st_ino}", state.st_size, state.st_mtime_ns


def _cache_file() -> Path | None:
    """Path of the memory, which may not exist; None if others may write to its folder."""
    try:
        return own_cache_folder() / FILE_NAME
    except MptTrtError:
        return None


def _read_memory() -> Memory:
    path = _cache_file()
    try:
        if path is None:
            return {}
        require_own_file(path)
        memory = json.loads(read_small_file(path, MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _remember(new: Memory) -> None:
    path = _cache_file()
    if path is None or not new:
        return
    memory = {key: state for key, state in _read_memory().items() if key not in new} | new
    kept = dict(list(memory.items())[-MOST_ENTRIES:])
    with contextlib.suppress(MptTrtError, OSError), replace_file(path) as partial:
        # Without indents, which Python's encoder in C does not support.
        partial.write_text(json.dumps(kept) + "\n")
        partial.chmod(0o600)
