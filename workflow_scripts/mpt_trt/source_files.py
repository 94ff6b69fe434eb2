"""What a script's outcome depends on: its own source and that of the library behind it.

Snakemake notices neither edits to a script that a shell rule calls nor to the modules behind it.
The rules hand it this hash as a parameter, and a changed parameter makes the outputs anew.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "mpt_trt"


@functools.cache
def source_hash(script: Path) -> str:
    """Hash of all files that the script runs through; it does not depend on where they lie."""
    digest = hashlib.sha256()
    for path in source_files(script):
        digest.update(f"{path.relative_to(script.parent)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def source_files(script: Path) -> tuple[Path, ...]:
    """`script` first, then every module of the library that it imports, directly or not."""
    found = [script]
    for path in found:  # grows while it is walked
        found += (module for module in _imported(path, script.parent) if module not in found)
    return tuple(found)


@functools.cache
def _imported(path: Path, root: Path) -> tuple[Path, ...]:
    """Once each, in the order of the source. Scripts have most modules in common."""
    return tuple(dict.fromkeys(_imports(path, root)))


def _imports(path: Path, root: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        else:
            continue
        for name in names:
            yield from _module_files(root, name.split("."))


def _module_files(root: Path, parts: list[str]) -> Iterator[Path]:
    """The files that run when the module is imported, its packages' `__init__` included."""
    for depth in range(1, len(parts) + 1):
        base = root.joinpath(*parts[:depth])
        for candidate in (base / "__init__.py", base.with_suffix(".py")):
            if candidate.is_file():
                yield candidate
