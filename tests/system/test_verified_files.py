"""Files against the hashes that were recorded of them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mpt_trt.errors import MptTrtError
from mpt_trt.system import verified_files
from mpt_trt.system.files import content_hash
from mpt_trt.system.verified_files import remember_written, require_recorded

AN_HOUR_AGO = time.time_ns() - 3_600_000_000_000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "weights").write_bytes(b"content")
    os.utime(tmp_path / "weights", ns=(AN_HOUR_AGO, AN_HOUR_AGO))
    return tmp_path


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read from now on."""
    seen: list[Path] = []
    compute = verified_files.content_hashes

    def watched(paths: dict[str, Path]) -> dict[str, str]:
        seen.extend(paths.values())
        return compute(paths)

    monkeypatch.setattr(verified_files, "content_hashes", watched)
    return seen


def check(folder: Path, expected: str) -> None:
    require_recorded(folder, {"weights": expected}, folder / "manifest.json", "remedy")


def test_a_file_is_read_once_and_again_when_it_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, seen = content_hash(folder / "weights"), reads(monkeypatch)
    check(folder, expected)
    check(folder, expected)
    assert seen == [folder / "weights"]
    (folder / "weights").write_bytes(b"changed")
    with pytest.raises(MptTrtError, match=r"weights: not the file that manifest\.json describes"):
        check(folder, expected)
    assert len(seen) == 2


def test_another_hash_than_the_remembered_one_is_refused(folder: Path) -> None:
    check(folder, content_hash(folder / "weights"))
    with pytest.raises(MptTrtError, match="not the file"):
        check(folder, "xxh3:" + "0" * 32)


def test_a_file_that_has_just_changed_is_not_remembered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(folder / "weights")
    expected, seen = content_hash(folder / "weights"), reads(monkeypatch)
    check(folder, expected)
    check(folder, expected)
    assert len(seen) == 2


def test_written_files_are_not_read_again_but_links_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, seen = content_hash(folder / "weights"), reads(monkeypatch)
    remember_written(folder, {"weights": expected})
    check(folder, expected)
    assert not seen
    os.link(folder / "weights", folder / "link")
    remember_written(folder, {"link": "xxh3:" + "0" * 32})
    with pytest.raises(MptTrtError, match="not the file"):
        require_recorded(folder, {"link": "xxh3:" + "0" * 32}, folder / "manifest.json", "remedy")


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b'{"1:2": 3}', b"\xff"])
def test_a_damaged_memory_is_ignored(folder: Path, content: bytes) -> None:
    memory = folder / "cache" / "mpt-trt" / verified_files.FILE_NAME
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content)
    check(folder, content_hash(folder / "weights"))


@pytest.mark.parametrize("name", [".", verified_files.FILE_NAME])
def test_a_memory_that_others_may_change_is_ignored(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected, cache = content_hash(folder / "weights"), folder / "cache" / "mpt-trt"
    remember_written(folder, {"weights": expected})
    assert cache.stat().st_mode & 0o777 == 0o700
    (cache / name).chmod(0o722)
    seen = reads(monkeypatch)
    check(folder, expected)
    assert seen


def test_a_cache_that_cannot_be_written_is_done_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").write_bytes(b"")
    for place in (folder / "file", Path("/proc/1/none")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        check(folder, content_hash(folder / "weights"))


def test_a_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(MptTrtError, match="missing: no such file"):
        require_recorded(
            folder, {"missing": "xxh3:" + "0" * 32}, folder / "manifest.json", "remedy"
        )
