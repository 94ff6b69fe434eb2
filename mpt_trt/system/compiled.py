"""Compiles C sources of this package, once each, into the user's cache."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import ContentHash
from mpt_trt.system.replace import replace_file
from mpt_trt.system.user_cache import user_cache_folder

COMPILERS = ("cc", "gcc", "clang")
REMEDY = "set XDG_CACHE_HOME to a folder of your own"
# nodelete: programs may unload a library whose functions are still in use.
FLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-shared", "-Wl,-z,nodelete")


def find_compiler() -> str | None:
    """Path of this machine's C compiler; None without one."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def compiled_library(source: Path) -> Path:
    """Path of the shared library of a C source, which is compiled unless the cache has it.

    Any number of processes may call this at the same time. The library's name contains a hash of
    everything it is made from.

    Raises MptTrtError when the cache lacks it and there is no compiler or the compiler fails, or
    when the cache is not this user's own folder.
    """
    digest = ContentHash()
    for part in (source.read_bytes(), " ".join(FLAGS).encode(), platform.machine().encode()):
        digest.update(part)
    name = f"{source.stem}-{str(digest).removeprefix('xxh3:')}.so"
    library = _own_folder() / name
    if not library.exists():
        with replace_file(library) as partial:
            _compile(source, partial)
    return library


def _own_folder() -> Path:
    """Returns the folder of compiled libraries; makes it if necessary."""
    folder = user_cache_folder()
    if folder is None:
        raise MptTrtError(f"there is no home folder for compiled libraries; {REMEDY}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise MptTrtError(f"{folder}: cannot be made ({error.strerror}); {REMEDY}") from None
    # Programs load what is in there.
    if owner != os.geteuid():
        raise MptTrtError(f"{folder}: belongs to another user; {REMEDY}")
    return folder


def _compile(source: Path, target: Path) -> None:
    compiler = find_compiler()
    if compiler is None:
        raise MptTrtError(f"there is no C compiler ({', '.join(COMPILERS)}); install one")
    command = [compiler, *FLAGS, "-o", str(target), str(source)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"status {finished.returncode}"]
        raise MptTrtError(f"{compiler} cannot compile {source.name}: {lines[0]}")
