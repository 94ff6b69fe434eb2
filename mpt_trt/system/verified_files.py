"""Compares files with the hashes that were recorded when they were made, each file once.

Compared files are remembered in the user's cache folder, by device, inode, size and time of the
last change. Without that memory, or if others may write to it, files are read again. The memory is
a file with a line per file, to which lines are appended, because every conversion and build adds
some; the last line of a file counts.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import content_hashes, read_small_file
from mpt_trt.system.replace import replace_file
from mpt_trt.system.user_cache import own_cache_folder, require_own_file

FILE_NAME = "content_hashes.txt"
MOST_ENTRIES = 50_000
# Twice the size of that many lines. A larger memory is written anew, without old lines.
MOST_BYTES = 8 << 20
# A file that changes twice within the clock's resolution keeps the same time (ext4: 4 ms; NFS: up
# to a second).
RACY_NS = 2_000_000_000

Memory = dict[str, str]
"""Size in bytes, time of the last change in ns since 1970 and content hash, separated by spaces, by
device and inode."""


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
        for name, (key, size, changed_ns) in identities.items()
        if memory.get(key) != f"{size} {changed_ns} {hashes[name]}"
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
            key: f"{size} {changed_ns} {contents[name]}"
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
        _remember({key: f"{size} {ns} {hashes[name]}" for name, (key, size, ns) in states.items()})


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
        content = read_small_file(path, 2 * MOST_BYTES)
    except (OSError, ValueError):
        return {}
    lines = (line.partition(" ") for line in content.decode("ascii", "replace").split("\n"))
    # A line that was written only in part equals no expected one.
    return {key: state for key, _, state in lines if state}


def _remember(new: Memory) -> None:
    path = _cache_file()
    if path is None or not new:
        return
    with contextlib.suppress(MptTrtError, OSError):
        try:
            require_own_file(path)
        except MptTrtError:
            _write_anew(path, new)
            return
        except FileNotFoundError:
            pass
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(path, flags, mode=0o600)
        try:
            os.write(descriptor, _lines(new))
            is_large = os.fstat(descriptor).st_size > MOST_BYTES
        finally:
            os.close(descriptor)
        if is_large:
            memory = _read_memory()
            # The order of the keys is that of their first lines.
            latest = {key: state for key, state in memory.items() if key not in new} | new
            _write_anew(path, dict(list(latest.items())[-MOST_ENTRIES:]))


def _write_anew(path: Path, memory: Memory) -> None:
    with replace_file(path) as partial:
        partial.write_bytes(_lines(memory))
        partial.chmod(0o600)


def _lines(memory: Memory) -> bytes:
    return "".join(f"{key} {state}\n" for key, state in memory.items()).encode("ascii")
