"""Libraries that are compiled into the user's cache."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
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


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    """Makes a program the only compiler that is found."""
    path = folder / "bin" / "cc"
    path.parent.mkdir()
    path.write_text(text)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("#!/bin/sh\nprintf '\\377 is wrong' >&2; exit 1", "\ufffd is wrong"),
        ("#!/bin/sh\nexit 3", "status 3"),
        ("#!/bin/sh\n", "it wrote no library"),
        ("no program", "Exec format error; install a C compiler"),
        ("#!/no/such/interpreter\n", "No such file or directory; install a C compiler"),
        ("#!/bin/sh\necho x > $8", r"the library cannot be loaded \(.*"),
        ("#!/bin/sh\nexec sleep 60", "it did not end within 0.1 s"),
    ],
)
def test_compilers_that_fail(
    source: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    compiler = fake_compiler(source.parent, monkeypatch, text)
    if "sleep" in text:
        monkeypatch.setattr(compiled, "TIMEOUT_S", 0.1)
    with pytest.raises(MptTrtError, match=f"^{compiler} cannot compile answer.c: {reason}$"):
        compiled_library(source)
    assert list((source.parent / "cache" / "mpt-trt").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x7fELF"])
def test_a_damaged_library_is_compiled_again(source: Path, content: bytes) -> None:
    library = compiled_library(source)
    library.unlink()  # the old content is still loaded
    library.write_bytes(content)
    assert compiled_library(source) == library
    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).answer())"
    assert subprocess.check_output([sys.executable, "-c", code, library], text=True) == "42\n"


def to_folder(library: Path) -> None:
    library.unlink()
    library.mkdir()


def to_link(library: Path) -> None:
    library.symlink_to(library.rename(library.with_name("other.so")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_folder, "{library}: not a regular file; delete it"),
        (to_link, "{library}: not a regular file; delete it"),
        (
            lambda library: library.chmod(0o720),
            "{library}: other users may write to it; chmod go-w {library}",
        ),
        (
            lambda library: library.parent.chmod(0o777),
            "{folder}: other users may write to it; chmod go-w {folder}",
        ),
        (
            lambda library: library.parent.chmod(0o770),
            "{folder}: other users may write to it; chmod go-w {folder}",
        ),
        (
            lambda library: library.parent.chmod(0o000),
            "{folder}: you may not read it; chmod u+rwx {folder}",
        ),
    ],
)
def test_libraries_that_others_may_change_are_not_loaded(
    source: Path, change: Callable[[Path], None], message: str
) -> None:
    library = compiled_library(source)
    change(library)
    try:
        with pytest.raises(MptTrtError) as caught:
            compiled_library(source)
    finally:
        library.parent.chmod(0o700)
    assert str(caught.value) == message.format(library=library, folder=library.parent)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_library_of_another_user(source: Path) -> None:
    library = compiled_library(source)
    os.chown(library, 12345, -1)
    with pytest.raises(MptTrtError, match=r"\.so: belongs to another user; delete it$"):
        compiled_library(source)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_modes_do_not_depend_on_the_umask(source: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        library = compiled_library(source)
        assert compiled_library(source) == library
    finally:
        os.umask(before)
    assert library.parent.stat().st_mode & 0o777 == library.stat().st_mode & 0o777 == 0o700
