"""Compiles C sources of this package, once each, into the user's cache."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import ContentHash
from mpt_trt.system.replace import replace_file
from mpt_trt.system.user_cache import own_cache_folder, require_own_file

COMPILERS = ("cc", "gcc", "clang")
# A compiler needs less than a second.
TIMEOUT_S = 120.0
# nodelete: programs may unload a library whose functions are still in use.
FLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-shared", "-Wl,-z,nodelete")


def find_compiler() -> str | None:
    """Path of this machine's C compiler; None without one."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def compiled_library(source: Path) -> Path:
    """Path of the shared library of a C source, which is compiled unless the cache has it.

    Any number of processes may call this at the same time. The library's name contains a hash of
    everything it is made from. A damaged library is compiled again.

    Raises MptTrtError when the cache lacks it and there is no compiler or the compiler fails, or
    when others may change the library or its folder.
    """
    digest = ContentHash()
    for part in (source.read_bytes(), " ".join(FLAGS).encode(), platform.machine().encode()):
        digest.update(part)
    name = f"{source.stem}-{str(digest).removeprefix('xxh3:')}.so"
    library = own_cache_folder() / name
    try:
        if not _is_usable(library):
            with replace_file(library) as partial:
                _compile(source, partial)
                partial.chmod(0o700)
    except OSError as error:
        raise MptTrtError(f"{library}: cannot be made ({error.strerror})") from None
    return library


def _is_usable(library: Path) -> bool:
    """Returns whether the cache has a library that can be loaded.

    Raises MptTrtError when others may change it.
    """
    try:
        require_own_file(library)
    except FileNotFoundError:
        return False
    return _loading_error(library) is None


def _loading_error(library: Path) -> str | None:
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return None


def _compile(source: Path, target: Path) -> None:
    compiler = find_compiler()
    if compiler is None:
        raise MptTrtError(f"there is no C compiler ({', '.join(COMPILERS)}); install one")
    failed = f"{compiler} cannot compile {source.name}"
    command = [compiler, *FLAGS, "-o", str(target), str(source)]
    try:
        finished = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise MptTrtError(f"{failed}: it did not end within {TIMEOUT_S:g} s") from None
    except OSError as error:
        raise MptTrtError(f"{failed}: {error.strerror}; install a C compiler") from None
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or [f"status {finished.returncode}"]
        raise MptTrtError(f"{failed}: {lines[0]}")
    if not target.is_file():
        raise MptTrtError(f"{failed}: it wrote no library")
    if (reason := _loading_error(target)) is not None:
        raise MptTrtError(f"{failed}: the library cannot be loaded ({reason})")
