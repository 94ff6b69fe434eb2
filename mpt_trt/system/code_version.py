"""Hashes the code that a script's result depends on: its own source and the library's.

Snakemake notices no edits of a script that a shell rule calls, or of the modules that it imports.
The rules pass this hash as a parameter, and Snakemake repeats a job when a parameter changes.

A script NAME.py runs the module `mpt_trt.commands.NAME`, which it imports by name after parsing its
options (`mpt_trt.cli.console.run_command`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

# The folder of the package mpt_trt.
PACKAGE = Path(__file__).resolve().parents[1]
VERSION = re.compile(rb"^__version__ = .*$", re.MULTILINE)
IMPORT = re.compile(
    r"\b(?:from\s+(?P<base>[\w.]+)\s+)?import\b\s*(?P<names>\([^)]*\)|(?:[^\n;#\\]|\\\n)*)"
)
# Between the names that are imported: brackets, continued lines and comments.
NO_NAME = re.compile(r"[()\\]|#.*")


@functools.cache
def source_hash(script: Path, package: Path = PACKAGE) -> str:
    """Hash of all files that the script executes.

    It depends neither on their location nor on the package's version, so a release does not repeat
    steps.
    """
    digest = hashlib.sha256()
    for path in source_files(script, package):
        digest.update(_named_content(path, package))
    return digest.hexdigest()[:16]


def source_files(script: Path, package: Path = PACKAGE) -> tuple[Path, ...]:
    """Lists `script`, then every module of the package that it imports, directly or indirectly.

    Kernels next to a module, which are stored as ONNX models, count as code.
    """
    paths = [script, *_command_files(script, package)]
    known = set(paths)
    for path in paths:  # grows while it is walked
        new = [module for module in _imported(path, package) if module not in known]
        paths += new
        known.update(new)
    kernels = {file for path in paths for file in _kernels_next_to(path)}
    return (*paths, *sorted(kernels))


# The next functions are cached, because many scripts share most of their files.


@functools.cache
def _named_content(path: Path, package: Path) -> bytes:
    """The name and content of a file, as they are hashed."""
    name = path.relative_to(package) if path.is_relative_to(package) else path.name
    content = path.read_bytes()
    if path == package / "__init__.py":
        content = VERSION.sub(b"", content)
    return f"{name}\0".encode() + content


@functools.cache
def _kernels_next_to(path: Path) -> tuple[Path, ...]:
    return _kernels(path.parent)


@functools.cache
def _kernels(folder: Path) -> tuple[Path, ...]:
    return tuple(folder.glob("kernels/*.onnx"))


def _command_files(script: Path, package: Path) -> tuple[Path, ...]:
    """The files of the script's command; none for a script that is not a command."""
    command = package / "commands" / f"{script.stem}.py"
    return _module_files(package, ("commands", script.stem)) if command.is_file() else ()


@functools.cache
def _imported(path: Path, package: Path) -> tuple[Path, ...]:
    """The package's files that `path` imports."""
    names = dict.fromkeys(_imported_names(path.read_text(), package.name))
    files = (file for name in names for file in _module_files(package, tuple(name.split(".")[1:])))
    return tuple(dict.fromkeys(files))


def _imported_names(code: str, package: str) -> Iterator[str]:
    """Names that may be modules of the package: `from a.b import c` gives `a.b` and `a.b.c`.

    Text that looks like an import counts, because parsing would take five times as long.
    """
    for match in IMPORT.finditer(code):
        base = match["base"]
        names = [
            each.split()[0] for each in NO_NAME.sub(" ", match["names"]).split(",") if each.strip()
        ]
        if base is None:
            yield from (name for name in names if name.split(".")[0] == package)
        elif base.split(".")[0] == package:
            yield from (base, *(f"{base}.{name}" for name in names))


@functools.cache
def _module_files(package: Path, parts: tuple[str, ...]) -> tuple[Path, ...]:
    """The files that run when the module is imported, including its packages' `__init__`.

    parts: the module's name without the package's.
    """
    modules = _modules(package)
    names = [(*parts, "__init__"), parts] if parts else [("__init__",)]
    own = tuple(modules[name] for name in names if name in modules)
    return _module_files(package, parts[:-1]) + own if parts else own


@functools.cache
def _modules(package: Path) -> dict[tuple[str, ...], Path]:
    """All files of the package, by the parts of their names without `.py`."""
    found = {}
    for folder, _, names in os.walk(package, followlinks=True):
        parts = Path(folder).relative_to(package).parts
        for name in names:
            if name.endswith(".py"):
                found[*parts, name.removesuffix(".py")] = Path(folder, name)
    return found
