"""Writes files that are either complete or absent; hard links and content hashes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import glob
import json
import mmap
import os
import re
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import xxhash

from mpt_trt.errors import MptTrtError
from mpt_trt.system.json_text import MOST_BYTES, parse_json_object

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


@contextlib.contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """Yields a new empty folder next to `target` that replaces it when the block succeeds.

    `target` is replaced as a whole; when the block raises, it stays as it was and the new folder is
    removed.

    Raises MptTrtError when the disk is full or the folder cannot be written.
    """
    with staging_directory(target) as partial:
        yield partial
        _exchange(partial, target)


@contextlib.contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """Yields a new empty folder beside `target`, from which files are moved there; then removes it.

    Raises MptTrtError when the disk is full or the folder cannot be written.
    """
    partial, is_alone = _partial_name(target), not target.parent.exists()
    with _plain_disk_errors(target):
        try:
            partial.mkdir(parents=True)
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if is_alone:
                # Nothing has come of it, or else the folder is not empty.
                with contextlib.suppress(OSError):
                    target.parent.rmdir()


@contextlib.contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """Yields a path next to `target`; the file written there replaces it if the block succeeds.

    Raises MptTrtError when the disk is full or the folder cannot be written.
    """
    partial = _partial_name(target)
    with _plain_disk_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def write_in_pieces(stream: IO[bytes], content: Bytes) -> None:
    """Writes `content` in pieces of 128 KiB.

    Linux's page cache holds a piece in one block of memory (ext4, Linux 6.18). Large blocks are
    often ones that were not used lately, whose memory the host of a virtual machine may have
    reclaimed: pieces of a mebibyte were written at 0.7 GB/s instead of 6.
    """
    view = memoryview(cast("Buffer", content)).cast("B")
    for start in range(0, len(view), WRITE_BYTES):
        stream.write(view[start : start + WRITE_BYTES])


def reserve(stream: IO[bytes], size: int) -> None:
    """Reserves `size` bytes for a new file, if the file system supports it.

    Reserved blocks take a third less time to write (ext4), and a full disk is noticed at once.
    `os.posix_fallocate` would write the file itself on file systems without support.
    """
    if sys.platform != "linux" or size == 0:
        return
    failed = _libc().fallocate(stream.fileno(), 0, 0, size)
    if failed and (code := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(code, os.strerror(code))


def start_writing(stream: IO[bytes]) -> None:
    """Makes the system start writing a file's cached content to disk; does not wait for it.

    By itself, it starts when a tenth of the memory waits to be written, and from twice that on it
    makes writers wait.
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


def write_json(target: Path, content: object) -> None:
    """Writes `content` as indented JSON, atomically."""
    with replace_file(target) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises MptTrtError that names the file when it is not one."""
    return parse_json_object(
        read_small_file(path, MOST_BYTES), path, "restore the file from its source"
    )


def read_small_file(path: Path, most_bytes: int) -> bytes:
    """Reads a file, up to a byte more than `most_bytes`.

    Raises MptTrtError, naming the file, when it is missing, no file or unreadable.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise MptTrtError(f"{path}: not a file")
        with path.open("rb") as stream:
            return stream.read(most_bytes + 1)
    except FileNotFoundError:
        raise MptTrtError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, MptTrtError):
            raise
        raise MptTrtError(f"{path}: cannot be read: {error}") from None


def hard_link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or a copy if the file system cannot link.

    Raises MptTrtError when `source` does not exist.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except FileNotFoundError:
        raise MptTrtError(f"{source}: no such file") from None
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
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


def _partial_name(target: Path) -> Path:
    """A name next to `target` that no other process uses; removes leftovers of dead processes."""
    prefix = f".{target.name}.partial-{socket.gethostname()}-"
    own = str(os.getpid())
    for leftover in target.parent.glob(glob.escape(prefix) + "*"):
        owner = leftover.name.removeprefix(prefix)
        # In a container every run may get the same process id.
        if owner == own or not Path("/proc", owner).exists():
            _remove(leftover)
    return target.with_name(prefix + own)


def _exchange(new: Path, target: Path) -> None:
    if not os.path.lexists(target):
        new.rename(target)
        return
    old = target.with_name(f"{new.name}-old")
    target.rename(old)
    new.rename(target)
    _remove(old)


def _remove(path: Path) -> None:
    """Removes a folder as far as possible, or a file or link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _plain_disk_errors(target: Path) -> Iterator[None]:
    remedies = {
        errno.ENOSPC: "the disk is full; free space or choose another output folder",
        errno.EDQUOT: "the disk quota is used up; free space or choose another output folder",
        errno.EFBIG: "the file-size limit is reached; raise it (ulimit -f)",
        errno.EROFS: "the file system is read-only; choose another output folder",
        errno.EACCES: "permission denied; choose another output folder",
        errno.ENOTDIR: "a part of this path is a file; choose another output folder",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in remedies:
            raise
        raise MptTrtError(f"cannot write {target}: {remedies[error.errno]}") from error
