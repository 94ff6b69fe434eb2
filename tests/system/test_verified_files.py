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


@pytest.mark.parametrize("content", [b"", b"\n\n", b"1:2", b"1:2 3 4 xxh3:", b"\xff \0 \n"])
def test_a_damaged_memory_is_ignored(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    memory = memory_file(folder)
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content)
    expected, seen = content_hash(folder / "weights"), reads(monkeypatch)
    for _ in range(3):  # the first line that is added may end a damaged one
        check(folder, expected)
    assert 1 <= len(seen) <= 2


def test_the_last_line_of_a_file_counts(folder: Path) -> None:
    expected, wrong = content_hash(folder / "weights"), "xxh3:" + "0" * 32
    remember_written(folder, {"weights": wrong})
    check(folder, wrong)
    remember_written(folder, {"weights": expected})
    check(folder, expected)
    with pytest.raises(MptTrtError, match="not the file"):
        check(folder, wrong)


def test_a_large_memory_loses_its_oldest_lines(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(20):
        (folder / str(index)).write_bytes(b"content")
        remember_written(folder, {str(index): "old"})
    monkeypatch.setattr(verified_files, "MOST_ENTRIES", 5)
    monkeypatch.setattr(verified_files, "MOST_BYTES", memory_file(folder).stat().st_size)
    remember_written(folder, {"0": "new"})
    lines = memory_file(folder).read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["old"] * 4 + ["new"]
    assert lines[0].startswith(f"{folder.stat().st_dev}:{(folder / '16').stat().st_ino} ")
    assert memory_file(folder).stat().st_mode & 0o777 == 0o600


def memory_file(folder: Path) -> Path:
    return folder / "cache" / "mpt-trt" / verified_files.FILE_NAME


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
