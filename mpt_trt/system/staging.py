"""Staging folders: an output is made in one and moved to its place when it is complete.

A staging folder has a random name, so any number of processes may write the same output, and a lock
(`flock`) that ends with its process, so the next process can distinguish leftovers from work in
progress.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from mpt_trt.system.disk_errors import plain_disk_errors
from mpt_trt.system.disk_sync import sync_entry
from mpt_trt.system.staging_names import prefix_of, stagings_of

# Names in a staging folder. `old` is the only copy of a result while nothing is in its place.
NEW, OLD, REPLACED = "new", "old", "replaced"


@contextlib.contextmanager
def staging_directory(target: Path) -> Iterator[Path]:
    """Yields a new empty folder next to `target`, to move finished files from; then removes it.

    Removes leftovers of processes that have ended, and restores what they had moved away. When the
    block raises, folders around `target` that did not exist before are removed if they are empty.

    Raises MptTrtError when the disk is full or the folder cannot be written.
    """
    with plain_disk_errors(target):
        _clean_up(target)
        missing = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _locked_staging(target) as staging:
                yield staging
        except BaseException:
            with contextlib.suppress(OSError):
                for folder in missing:
                    folder.rmdir()
            raise


def move_together(folder: Path, names: Iterable[str], target: Path) -> None:
    """Moves finished files into the folder `target`, one after the other.

    Other processes that move files there wait for it, so the files of several never mix.
    """
    with plain_disk_errors(target):
        lock = _lock(target, fcntl.LOCK_EX)
        try:
            for name in names:
                (folder / name).replace(target / name)
                sync_entry(target / name)
        finally:
            if lock is not None:
                os.close(lock)


def recover(target: Path) -> None:
    """Restores what an interrupted replacement had moved away; an existing folder stays.

    Readers need it, because on file systems that cannot exchange folders, `target` is absent
    between two steps of a replacement.
    """
    if os.path.lexists(target) or target.name in ("", ".."):
        return
    for staging in stagings_of(target, host="*"):
        with contextlib.suppress(OSError):
            (staging / OLD).rename(target)


@contextlib.contextmanager
def _locked_staging(target: Path) -> Iterator[Path]:
    while True:
        name = f"{prefix_of(target)}{os.getpid()}-{os.urandom(4).hex()}"
        staging, lock = target.with_name(name), None
        try:
            staging.mkdir()
            with contextlib.suppress(FileNotFoundError):
                lock = _lock(staging, fcntl.LOCK_EX)
            # Between the two calls, another process may have mistaken it for a leftover.
            if staging.exists():
                yield staging
                return
        finally:
            _settle(staging, target)
            if lock is not None:
                os.close(lock)


def _lock(folder: Path, how: int) -> int | None:
    """Locks a folder for this process; None if the file system has no locks.

    Raises BlockingIOError when another process has the lock and `how` does not wait.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _clean_up(target: Path) -> None:
    """Restores what interrupted replacements had moved away, and removes their leftovers."""
    if not target.parent.is_dir():
        return
    recover(target)
    prefix = prefix_of(target)
    for staging in stagings_of(target, glob.escape(os.uname().nodename)):
        if match := re.fullmatch(r"([0-9]+)-[0-9a-f]{8}", staging.name.removeprefix(prefix)):
            # The process that made it may have ended already, and the folder with it.
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                _remove_leftover(staging, target, int(match[1]))


def _remove_leftover(staging: Path, target: Path, process: int) -> None:
    # In a container, every run may get the same process id.
    is_own = process == os.getpid()
    if not is_own and Path("/proc", str(process)).exists():
        return
    lock = _lock(staging, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is not None:
        try:
            _settle(staging, target)
        finally:
            os.close(lock)
    elif not is_own:
        _settle(staging, target)


def _settle(staging: Path, target: Path) -> None:
    """Removes a staging folder, after moving back what was moved away and not replaced."""
    old = staging / OLD
    if os.path.lexists(old):
        try:
            old.rename(target)
        except OSError:
            if not os.path.lexists(target):
                return
            old.rename(staging / REPLACED)
    shutil.rmtree(staging, ignore_errors=True)
