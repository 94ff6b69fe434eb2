"""Writes outputs that are either complete or absent, and never replaces anything foreign.

An output is made in a staging folder next to its place and moved there in one step. Folders are
exchanged by `renameat2`. If the file system cannot do that, the old folder is moved to `old` in the
staging folder first; if the process ends before the new folder is in place, `recover` moves it
back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt_trt.errors import MptTrtError
from mpt_trt.system.disk_errors import is_name, plain_disk_errors
from mpt_trt.system.disk_sync import sync, sync_entry
from mpt_trt.system.staging import NEW, OLD, REPLACED, staging_directory

# Maximum number of attempts while other processes put their results in the same place.
ATTEMPTS = 100
# Files that Snakemake and network file systems put into any folder.
UNOWNED_FILES = re.compile(r"\.snakemake_timestamp|\.nfs[0-9a-f]+")
WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
AT_FDCWD, RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that mpt-trt's tools write and may replace.

    name: for messages, such as "an FT checkpoint". own_files: relative paths of the files that
    mpt-trt's tool wrote there, from the folder's manifest; None for a folder without such a
    manifest.
    """

    name: str
    own_files: Callable[[Path], Collection[str] | None]


# For folders that only --force replaces.
NEVER_REPLACED = FolderKind("a folder of this tool", lambda _: None)


def read_mark(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file with any content; {} if it is not one."""
    try:
        # Opening a pipe would wait for its writer.
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def require_replaceable(
    target: Path, kind: FolderKind, inputs: Iterable[Path] = (), force: bool = False
) -> None:
    """Raises MptTrtError unless the folder `target` may be made or replaced.

    It may if it does not exist, is empty, or is a folder of the same kind without other files.
    Force replaces any folder except an input or a folder around or inside one.
    """
    if target.name in ("", ".."):
        raise MptTrtError(
            f"output folder {str(target)!r}: cannot be replaced as a whole; name a folder inside it"
        )
    inputs = tuple(inputs)
    with plain_disk_errors(target):
        for _ in range(ATTEMPTS):
            with _held(target) as held:
                if held is None:
                    return
                try:
                    _require_replaceable(target, held, kind, inputs, force)
                    return
                except (MptTrtError, FileNotFoundError):
                    # Another process may have replaced the folder and may be removing its files.
                    if held.is_in_place():
                        raise
    raise _busy(target)


@contextlib.contextmanager
def replace_directory(
    target: Path, kind: FolderKind, inputs: Iterable[Path] = (), force: bool = False
) -> Iterator[Path]:
    """Yields a new empty folder that replaces `target` in one step when the block succeeds.

    When the block raises, `target` stays as it was, and the new folder is removed. inputs: files
    and folders that the block reads.

    Raises MptTrtError when `target` must not be replaced (see `require_replaceable`), the disk is
    full, or the folder cannot be written.
    """
    inputs = tuple(inputs)
    require_replaceable(target, kind, inputs, force)
    with staging_directory(target) as staging:
        new = staging / NEW
        new.mkdir()
        yield new
        sync(new)
        _put_in_place(
            new,
            target,
            may_replace=lambda: require_replaceable(target, kind, inputs, force),
            may_remove=lambda old: None if force else _require_own(old, target, kind),
        )
        sync_entry(target)


@contextlib.contextmanager
def replace_file(target: Path, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yields a path; a file written there replaces `target` if the block succeeds.

    Its folder is temporary, and may take other files. If the process is killed, the next one with
    the same target removes it.

    A link stays, and the file that it points to is replaced. A device, a pipe, and the file that is
    the standard output are written to. inputs: files and folders that the block reads.

    Raises MptTrtError when `target` must not be written (see `require_writable`), the disk is full,
    or the folder cannot be written.
    """
    require_writable(target, inputs)
    if not is_replaced(target):
        import tempfile  # few outputs are devices or pipes

        with tempfile.TemporaryDirectory() as folder, plain_disk_errors(target):
            yield Path(folder) / NEW
            _write_to(target, (Path(folder) / NEW).read_bytes())
        return
    place = Path(os.path.realpath(target)) if target.is_symlink() else target
    with staging_directory(place) as staging:
        yield staging / NEW
        sync(staging / NEW)
        (staging / NEW).replace(place)
        sync_entry(place)


def require_writable(target: Path, inputs: Iterable[Path] = ()) -> None:
    """Raises MptTrtError when the file `target` must not be written.

    These are folders, inputs, existing files inside an input folder, and files that nobody may
    write, which are protected that way.
    """
    with plain_disk_errors(target):
        if target.name in ("", "..") or target.is_dir():
            raise MptTrtError(f"output {str(target)!r}: a folder; name a file")
        if _lstat(target) is None:
            return
        if target.is_file() and not target.stat().st_mode & WRITABLE:
            raise MptTrtError(
                f"{target}: not replaced, because it is read-only; choose another output file, or "
                "make it writable (chmod u+w)"
            )
        for source in inputs:
            if _is_in(target, source):
                raise MptTrtError(
                    f"{target}: not replaced, because it is read from {source}; "
                    "choose another output file"
                )


def is_replaced(target: Path) -> bool:
    """Returns whether a new file replaces `target`, instead of being written to it."""
    try:
        existing = target.stat()
    except OSError:
        return True
    return stat.S_ISREG(existing.st_mode) and _standard_stream(existing) is None


# --- Replaceable folders -------------------------------------------------------------------------


def _require_replaceable(
    target: Path, held: _Held, kind: FolderKind, inputs: Iterable[Path], force: bool
) -> None:
    if stat.S_ISLNK(held.state.st_mode):
        raise MptTrtError(
            f"{target}: a symbolic link, which is never replaced; "
            "name the folder that it points to, or another one"
        )
    if not stat.S_ISDIR(held.state.st_mode):
        raise MptTrtError(
            f"{target}: a file, which a folder never replaces; choose another output folder"
        )
    if not os.listdir(held.view):  # noqa: PTH208
        return
    for source in inputs:
        _require_apart(target, source)
    if not force:
        _require_own(held.view, target, kind)


@dataclass(frozen=True)
class _Held:
    """A file or folder that stays the same, even if other processes replace its path.

    view: a path that follows it when it is moved.
    """

    path: Path
    view: Path
    state: os.stat_result

    def is_in_place(self) -> bool:
        now = _lstat(self.path)
        return now is not None and os.path.samestat(self.state, now)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[_Held | None]:
    """Yields what is at `path`, or None if nothing is there. Errors inside name that path."""
    try:
        # While it is open, no other folder gets its inode number.
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield None
        return
    view = f"/proc/self/fd/{descriptor}"
    try:
        yield _Held(path, Path(view), os.fstat(descriptor))
    except OSError as error:
        if is_name(error.filename):
            error.filename = os.fsdecode(error.filename).replace(view, str(path), 1)
        raise
    finally:
        os.close(descriptor)


def _busy(target: Path) -> MptTrtError:
    return MptTrtError(f"cannot write {target}: other processes write it all the time; stop them")


def _require_apart(target: Path, source: Path) -> None:
    if _is_in(source, target):
        raise MptTrtError(
            f"{target}: not replaced, because the input {source} is in it; "
            "choose another output folder"
        )
    if _is_in(target, source):
        raise MptTrtError(
            f"{target}: not replaced, because it is in the input {source}; "
            "choose another output folder"
        )


def _is_in(path: Path, folder: Path) -> bool:
    """Returns whether `path` is `folder` or is in it."""
    if not folder.exists():
        return False
    real = Path(os.path.realpath(path))
    return any(folder.samefile(each) for each in (real, *real.parents) if each.exists())


def _require_own(folder: Path, target: Path, kind: FolderKind) -> None:
    """Raises MptTrtError, about `target`, unless all files in `folder` are of this kind."""
    own = kind.own_files(folder)
    if own is None:
        raise MptTrtError(
            f"{target}: not replaced, because it is not empty and not {kind.name} of this tool; "
            "choose another output folder, or replace it with --force"
        )
    for root, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if Path(root, name).is_symlink()]
        for name in [*files, *links]:
            path = os.path.relpath(f"{root}/{name}", folder)
            if path not in own and not UNOWNED_FILES.fullmatch(name):
                raise MptTrtError(
                    f"{target}: not replaced, because {path} in it is not a file of this tool; "
                    "move it away, choose another output folder, or delete it with --force"
                )


def _raise(error: OSError) -> None:
    raise error


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


# --- Single files that are not replaced ----------------------------------------------------------


def _standard_stream(existing: os.stat_result) -> int | None:
    """Returns the descriptor of stdout or stderr, if it is that file."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(existing, os.fstat(descriptor)):
                return descriptor
    return None


def _write_to(target: Path, content: bytes) -> None:
    descriptor = _standard_stream(target.stat())
    if descriptor is None:
        with target.open("wb", buffering=0) as stream:
            _write_all(stream.fileno(), content)
        return
    for standard in (sys.stdout, sys.stderr):
        standard.flush()
    _write_all(descriptor, content)


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


# --- Putting a folder in place -------------------------------------------------------------------


def _put_in_place(
    new: Path,
    target: Path,
    may_replace: Callable[[], None],
    may_remove: Callable[[Path], None],
) -> None:
    """Moves the folder `new` to `target`, and the old content to the staging folder.

    may_replace, may_remove: raise when the content that is or was at `target` must be kept.
    """
    for attempt in range(ATTEMPTS):
        if _move_to_free_place(new, target):
            return
        may_replace()
        try:
            is_exchanged = exchange(new, target)
        except FileNotFoundError:
            continue
        if is_exchanged:
            # Another process may have put something there after may_replace.
            try:
                may_remove(new)
            except MptTrtError:
                exchange(new, target)
                raise
            return
        if _move_in_two_steps(new, target, attempt, may_remove):
            return
    raise _busy(target)


def _move_to_free_place(new: Path, target: Path) -> bool:
    """Moves a folder to a path that is free or an empty folder; False if it is neither."""
    try:
        new.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        return False
    return True


def _move_in_two_steps(
    new: Path, target: Path, attempt: int, may_remove: Callable[[Path], None]
) -> bool:
    old = new.with_name(OLD)
    try:
        target.rename(old)
    except FileNotFoundError:
        return False
    with _held(old) as held:
        if held is None:
            return False  # A reader has moved it back.
        try:
            may_remove(held.view)
        except (MptTrtError, FileNotFoundError):
            if held.is_in_place():
                raise
            return False
    is_moved = _move_to_free_place(new, target)
    # Something is at `target` now, so this is not the only copy any more.
    with contextlib.suppress(FileNotFoundError):
        old.rename(new.with_name(f"{REPLACED}{attempt}"))
    return is_moved


def exchange(first: Path, second: Path) -> bool:
    """Exchanges two files or folders in one step; False if the system cannot do that."""
    rename = _renameat2()
    if rename is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


@functools.cache
def _renameat2() -> Any:
    if sys.platform != "linux":
        return None
    # glibc has it since 2.28, musl since 1.2.5.
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        text, number = ctypes.c_char_p, ctypes.c_int
        function.argtypes = (number, text, number, text, ctypes.c_uint)
    return function
