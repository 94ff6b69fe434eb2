"""Libraries that are compiled into the user's cache."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpt_trt.errors import MptTrtError
from mpt_trt.system import compiled
from mpt_trt.system.compiled import compiled_library

SOURCE = '__attribute__((visibility("default"))) int answer(void) { return 42; }\n'
PROCESSES = 4

pytestmark = pytest.mark.skipif(compiled.find_compiler() is None, reason="needs a C compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    return path


def test_a_source_is_compiled_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = compiled_library(source)
    assert ctypes.CDLL(str(library)).answer() == 42
    assert library.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(compiled, "COMPILERS", ())
    assert compiled_library(source) == library
    source.write_text(SOURCE.replace("42", "43"))
    with pytest.raises(MptTrtError, match=r"^there is no C compiler"):
        compiled_library(source)


def test_another_source_is_another_library(source: Path) -> None:
    first = compiled_library(source)
    source.write_text(SOURCE.replace("42", "43"))
    second = compiled_library(source)
    assert [ctypes.CDLL(str(path)).answer() for path in (first, second)] == [42, 43]


def test_processes_that_start_together(source: Path) -> None:
    code = (
        "import ctypes, pathlib, sys; from mpt_trt.system.compiled import compiled_library; "
        "print(ctypes.CDLL(str(compiled_library(pathlib.Path(sys.argv[1])))).answer())"
    )
    command = [sys.executable, "-c", code, str(source)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)
    ]
    assert [process.communicate(timeout=60)[0] for process in started] == ["42\n"] * PROCESSES
    (library,) = compiled_library(source).parent.iterdir()
    assert library.suffix == ".so"


def test_a_source_that_does_not_compile_leaves_nothing(source: Path) -> None:
    source.write_text("int answer(void) { return x; }")
    with pytest.raises(MptTrtError, match=r"cannot compile answer\.c: .*answer\.c"):
        compiled_library(source)
    assert list((source.parent / "cache" / "mpt-trt").iterdir()) == []


def test_a_cache_that_cannot_be_made(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))
    with pytest.raises(MptTrtError, match="set XDG_CACHE_HOME to a folder of your own"):
        compiled_library(source)


def test_a_cache_of_another_user(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(MptTrtError, match="mpt-trt: belongs to another user"):
        compiled_library(source)
