"""What a script's outcome depends on: its own source and that of the library behind it.

Snakemake notices neither edits to a script that a shell rule calls nor to the modules behind it.
The rules hand it this hash as a parameter, and a changed parameter makes the outputs anew.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "mpt_trt"
# The folder that holds the package, and beside it the scripts.
ROOT = Path(__file__).resolve().parents[2]
# The kinds of nodes in which statements are.
BLOCKS = (ast.stmt, ast.excepthandler, ast.match_case)


@functools.cache
def source_hash(script: Path) -> str:
    """Hash of all files that the script runs through; it does not depend on where they lie."""
    digest = hashlib.sha256()
    for path in source_files(script):
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def source_files(script: Path) -> tuple[Path, ...]:
    """`script` first, then every module of the library that it imports, directly or not."""
    found, known = [script], {script}
    for path in found:  # grows while it is walked
        new = [module for module in _imported(path, ROOT) if module not in known]
        found += new
        known.update(new)
    return tuple(found)


@functools.cache
def _imported(path: Path, root: Path) -> tuple[Path, ...]:
    """The library's files that run when the lines of `path` do; most are behind many scripts."""
    names = dict.fromkeys(_imported_names(ast.parse(path.read_text())))
    files = (file for name in names for file in _module_files(root, tuple(name.split("."))))
    return tuple(dict.fromkeys(files))


def _imported_names(module: ast.Module) -> Iterator[str]:
    """What may be a module of the library: `from a.b import c` names `a.b` and `a.b.c`."""
    for node in _statements(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == PACKAGE)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements within a node, in the order of ast.walk, which looks at expressions, too."""
    waiting = deque([node])
    while waiting:
        found = [n for n in ast.iter_child_nodes(waiting.popleft()) if isinstance(n, BLOCKS)]
        waiting += found
        yield from found


@functools.cache
def _module_files(root: Path, parts: tuple[str, ...]) -> tuple[Path, ...]:
    """The files that run when the module is imported, its packages' `__init__` included."""
    if not parts:
        return ()
    base = root.joinpath(*parts)
    candidates = (base / "__init__.py", base.with_suffix(".py"))
    return *_module_files(root, parts[:-1]), *(path for path in candidates if path.is_file())
