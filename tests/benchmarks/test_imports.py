"""Benchmarks run rarely; what they import from the package must exist all the time."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

from support.paths import REPOSITORY

BENCHMARKS = sorted((REPOSITORY / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_imports_of_the_package_exist(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("mpt_trt"):
            continue
        module = importlib.import_module(str(node.module))
        for name in (each.name for each in node.names):
            is_module = hasattr(module, "__path__") and importlib.util.find_spec(
                f"{node.module}.{name}"
            )
            assert hasattr(module, name) or is_module, f"{node.module} has no {name}"
