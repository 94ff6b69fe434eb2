"""Errors of the operating system while an output is written, in one sentence with a remedy."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mpt_trt.errors import MptTrtError
from mpt_trt.system.staging_names import shown_name

REMEDIES = {
    errno.ENOSPC: "the disk is full; free space or write it elsewhere",
    errno.EDQUOT: "the disk quota is used up; free space or write it elsewhere",
    errno.EFBIG: "the file-size limit is reached; raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only; write it elsewhere",
    errno.EACCES: "permission denied; write it elsewhere",
    errno.EPERM: "not permitted; write it elsewhere",
    errno.ENOTDIR: "a part of this path is a file; write it elsewhere",
    errno.EEXIST: "a part of this path is a link to nothing; write it elsewhere",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ELOOP: "a part of this path is a link to itself; write it elsewhere",
    errno.EBUSY: "it is a mount point or in use; choose a folder inside it",
}


@contextlib.contextmanager
def plain_disk_errors(target: Path) -> Iterator[None]:
    """Turns system errors of writing `target` into one sentence.

    An error that names another file is reported for that file, such as an unreadable input.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        names = [os.fsdecode(n) for n in (error.filename, error.filename2) if is_name(n)]
        if names and not any(_belongs_to(name, target) for name in names):
            raise MptTrtError(f"{names[0]}: {error.strerror}") from error
        raise MptTrtError(f"cannot write {target}: {REMEDIES[error.errno]}") from error


def is_name(value: object) -> bool:
    """Returns whether a field of an OSError names a file; some have numbers or None there."""
    return isinstance(value, str | bytes | os.PathLike)


def _belongs_to(name: str, target: Path) -> bool:
    """Returns whether a path is, contains, or is in the target or its staging folder."""
    # Path.resolve would follow links.
    path, whole = Path(os.path.abspath(name)), Path(os.path.abspath(target))  # noqa: PTH100
    if path == whole or path in whole.parents or whole in path.parents:
        return True
    below = str(path).removeprefix(f"{whole.parent}/")
    return below.startswith(f".{shown_name(whole)}.partial-")
