"""Writes and reads files: JSON, fast writing and reading, hard links and content hashes."""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import mmap
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import xxhash

from mpt_trt.errors import MptTrtError
from mpt_trt.system.json_text import MOST_BYTES, parse_json_object
from mpt_trt.system.replace import replace_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    # NumPy's stubs declare the buffer protocol only from Python 3.12 on.
    Bytes = Buffer | NDArray[Any]


HASH_CHUNK_BYTES = 1 << 22
CONTENT_HASH = re.compile("xxh3:[0-9a-f]{32}")
WRITE_BYTES = 1 << 17
MADV_POPULATE_READ = 22
SYNC_FILE_RANGE_WRITE = 2


def write_in_pieces(stream: IO[bytes], content: Bytes) -> None:
    """Writes `content` in pieces of 128 KiB.

    Linux's page cache holds a piece in one block of memory (ext4, Linux 6.18). Large blocks have
    often been unused for a while, so the host of a virtual machine may have reclaimed their memory
    (docs/appendix/experiments.md).
    """
    view = memoryview(cast("Buffer", content)).cast("B")
    for start in range(0, len(view), WRITE_BYTES):
        stream.write(view[start : start + WRITE_BYTES])


def reserve(stream: IO[bytes], size: int) -> None:
    """Reserves `size` bytes for a new file, if the file system supports it.

    Reserved blocks are faster to write (ext4), and a full disk is detected at once.
    `os.posix_fallocate` would write the file itself on file systems without support.
    """
    if sys.platform != "linux" or size == 0:
        return
    failed = _libc().fallocate(stream.fileno(), 0, 0, size)
    if failed and (code := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(code, os.strerror(code))


def start_writing(stream: IO[bytes]) -> None:
    """Makes the system start writing a file's cached content to disk, without waiting for it.

    By default, Linux starts when a tenth of the memory waits to be written, and from twice that on
    it pauses writers.
    """
    if sys.platform == "linux":
        stream.flush()
        _libc().sync_file_range(stream.fileno(), 0, 0, SYNC_FILE_RANGE_WRITE)


def map_pages(mapped: NDArray[Any]) -> None:
    """Reads part of a memory-mapped file sequentially, and lets other threads run meanwhile.

    Linux before 5.14 reads pages only when they are used.
    """
    if sys.platform != "linux":
        return
    address = mapped.__array_interface__["data"][0]
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0:
        _libc().madvise(start, size, MADV_POPULATE_READ)


@functools.cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    offset = ctypes.c_int64
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, offset, offset)
    library.sync_file_range.argtypes = (ctypes.c_int, offset, offset, ctypes.c_uint)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


def write_json(target: Path, content: object, inputs: Iterable[Path] = ()) -> None:
    """Writes `content` as indented JSON, atomically. inputs: see `replace_file`."""
    with replace_file(target, inputs) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises MptTrtError that names the file when it is not one."""
    return parse_json_object(
        read_small_file(path, MOST_BYTES), path, "restore the file from its source"
    )


def read_small_file(path: Path, most_bytes: int) -> bytes:
    """Reads a file, up to one byte more than `most_bytes`.

    Raises MptTrtError, naming the file, when it is missing, not a regular file or unreadable.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise MptTrtError(f"{path}: not a file; put the file of that name there")
        with path.open("rb") as stream:
            return stream.read(most_bytes + 1)
    except FileNotFoundError:
        raise MptTrtError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, MptTrtError):
            raise
        # The whole text of a system error names the path again.
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise MptTrtError(f"{path}: cannot be read: {reason}") from None


def read_text_file(path: Path) -> str:
    """Reads a UTF-8 text without changing its line ends; a byte order mark is left out.

    Raises MptTrtError, naming the file, when it is missing, unreadable, not UTF-8, or contains NUL
    characters, as UTF-16 without a mark does.
    """
    if path.exists() and not path.is_file():
        raise MptTrtError(f"{path}: cannot be read as UTF-8 text: not a file; name a text file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MptTrtError(
            f"{path}: cannot be read as UTF-8 text: {error}; convert it to UTF-8"
        ) from None
    except OSError as error:
        raise MptTrtError(f"{path}: cannot be read as UTF-8 text: {error.strerror}") from None
    require_no_nul(path, text)
    return text


def require_no_nul(path: Path, text: str) -> None:
    """Raises MptTrtError when a file's text contains NUL, as UTF-16 without a mark does."""
    if "\0" in text:
        raise MptTrtError(
            f"{path}: not a text, because it contains NUL characters (UTF-16?); convert it to UTF-8"
        )


def hard_link(source: Path, target: Path) -> None:
    """Makes `target` a hard link to `source`, or a copy if the file system cannot link.

    Raises MptTrtError when `source` does not exist.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except FileNotFoundError:
        raise MptTrtError(f"{source}: no such file") from None
    except OSError as error:
        if error.errno not in (
            errno.EXDEV,
            errno.EPERM,
            errno.EACCES,
            errno.EMLINK,
            errno.EOPNOTSUPP,
        ):
            raise
        shutil.copyfile(source, target)


class ContentHash:
    """XXH3-128 of bytes that come in pieces, as `xxh3:<32 hex digits>`.

    It identifies content at memory speed; it does not protect against forgery.
    """

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()

    def update(self, content: Bytes) -> None:
        """Appends bytes to the content."""
        self._digest.update(cast("Buffer", content))

    def __str__(self) -> str:
        return f"xxh3:{self._digest.hexdigest()}"


def content_hash(path: Path) -> str:
    """The ContentHash of a file; raises MptTrtError when it cannot be read."""
    digest = ContentHash()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise MptTrtError(f"{path}: cannot be read: {error.strerror}") from None
    return str(digest)


def content_hashes(paths: dict[str, Path]) -> dict[str, str]:
    """Computes the content hash of every path, on all cores; the keys are kept."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(content_hash, paths.values()), strict=True))
