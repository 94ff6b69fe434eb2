"""A replacement of a folder, killed before each of its system calls by strace."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mpt_trt.system.staging import recover
from support.paths import REPOSITORY

pytestmark = [
    pytest.mark.kills,
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace"),
]
PROGRAM = """
import json, os, sys
from pathlib import Path
from mpt_trt.system import replace

target, way, text = sys.argv[1:]
if way == "two steps":
    replace.exchange = lambda first, second: False
names = ["a", "sub/b"]
kind = replace.FolderKind("a test result", lambda folder: [*names, "mark"])
os.getppid()
if text:
    with replace.replace_directory(Path(target), kind) as folder:
        (folder / "sub").mkdir()
        for name in [*names, "mark"]:
            (folder / name).write_text(text)
"""
TREE = {"a", "mark", "sub/b"}


def run(folder: Path, way: str, text: str, *strace: str) -> int:
    command = [sys.executable, "-c", PROGRAM, str(folder / "target"), way, text]
    return subprocess.run([*strace, *command], cwd=REPOSITORY, stderr=subprocess.DEVNULL).returncode


def calls(folder: Path, way: str, text: str) -> Counter[str]:
    """Counts each system call."""
    log = folder.parent / "calls"
    assert run(folder, way, text, "strace", "-f", "-qq", "-o", str(log)) == 0
    names = (line.split(None, 1)[1].partition("(")[0] for line in log.read_text().splitlines())
    return Counter(name for name in names if name.isidentifier())


@pytest.mark.parametrize("way", ["exchange", "two steps"])
def test_killed_before_each_system_call(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    assert run(folder, way, "old") == 0
    before, all_calls = calls(folder, way, ""), calls(folder, way, "new")
    assert run(folder, way, "old") == 0
    killed = 0
    for name in sorted(all_calls):
        for number in range(before[name] + 1, all_calls[name] + 1):
            injection = f"inject={name}:signal=KILL:when={number}"
            strace = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", injection)
            killed += run(folder, way, "new", *strace) != 0
            recover(folder / "target")
            texts = {
                str(path.relative_to(folder / "target")): path.read_text()
                for path in (folder / "target").rglob("*")
                if path.is_file()
            }
            assert texts.keys() == TREE, f"{name} {number}"
            assert len(set(texts.values())) == 1, f"{name} {number}"
            assert run(folder, way, "old") == 0
            assert [path.name for path in folder.iterdir()] == ["target"], f"{name} {number}"
    assert killed > 100
