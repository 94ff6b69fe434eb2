"""Copies of the modules that run plans, with changes to their code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import mpt_trt

PACKAGE = "mutated"
MODULES = {
    "engine": "mpt_trt.engines.tensorrt.engine",
    "plan": "mpt_trt.engines.tensorrt.plan",
    "nccl": "mpt_trt.engines.cuda.nccl",
    "graphs": "mpt_trt.engines.cuda.graphs",
    "kv_cache": "mpt_trt.engines.cuda.kv_cache",
    "steps_ahead": "mpt_trt.engines.cuda.steps_ahead",
    "memory": "mpt_trt.engines.cuda.memory",
}
Change = tuple[str, str, str]
"""A module's key in MODULES, text that is there exactly once, and text to put in its place."""


def source(module: str) -> str:
    path = Path(mpt_trt.__file__).parent.joinpath(*MODULES[module].split(".")[1:])
    return path.with_suffix(".py").read_text()


@contextmanager
def mutated(changes: Sequence[Change], folder: Path) -> Iterator[dict[str, ModuleType]]:
    """Imports copies of MODULES with the changes, by key. folder: empty, for the copies."""
    package = folder / PACKAGE
    package.mkdir()
    texts = {key: source(key) for key in MODULES}
    for key, old, new in changes:
        assert texts[key].count(old) == 1, f"{key} has {texts[key].count(old)} of {old!r}"
        texts[key] = texts[key].replace(old, new)
    for key, text in texts.items():
        for name, module in MODULES.items():
            text = text.replace(f"from {module} import", f"from {PACKAGE}.{name} import")
        (package / f"{key}.py").write_text(text)
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        yield {key: importlib.import_module(f"{PACKAGE}.{key}") for key in MODULES}
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
