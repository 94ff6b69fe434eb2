"""Arrays of an npz archive: in blocks of rows, damaged, and read by several threads."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from numpy.lib import format as npy

from mpt_trt.calibration.npz_file import NpzFile
from mpt_trt.errors import MptTrtError

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32])
def test_rows_come_as_the_whole(
    tmp_path: Path, dtype: np.dtype, by_column: bool, save: Callable
) -> None:
    values = np.random.default_rng(0).standard_normal((13, 5)).astype(dtype)
    save(tmp_path / "x.npz", m=np.asfortranarray(values) if by_column else values)
    blocks = [block.copy() for block in NpzFile(tmp_path / "x.npz").rows("m", 4)]
    assert [len(block) for block in blocks] == [4, 4, 4, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), values, strict=True)


def test_damage_shows_when_all_rows_are_read(tmp_path: Path) -> None:
    values = np.ones((300, 64), np.float32)
    np.savez(tmp_path / "x.npz", m=values)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(MptTrtError, match="m is damaged"):
        list(NpzFile(tmp_path / "x.npz").rows("m", 128))


def test_messages_do_not_quote_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", m=np.ones((300, 64), np.float32))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[26:28] = (10_000).to_bytes(2, "little")  # length of the name in the entry's header
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(MptTrtError, match=r"m is damaged .*; delete it and ") as caught:
        NpzFile(tmp_path / "x.npz").shape("m")
    assert len(str(caught.value)) < len(str(tmp_path)) + 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 and no more", "cannot be read .*; delete it and make it again$"),
        (b"an essay", "cannot be read as an npz archive .*zip file.; make it again$"),
        (None, "x.npz: Is a directory; name an npz file$"),
    ],
)
def test_only_a_damaged_archive_is_to_be_deleted(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.npz"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(MptTrtError, match=message):
        NpzFile(path, "make it again")


def test_rows_with_nan_are_refused(tmp_path: Path) -> None:
    values = np.ones((30, 64), np.float32)
    values[20, 3] = np.nan
    np.savez(tmp_path / "x.npz", m=values)
    with pytest.raises(MptTrtError, match="m holds NaN or Inf"):
        list(NpzFile(tmp_path / "x.npz").rows("m", 8))


def test_headers_are_parsed_by_one_thread_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.arange(6, dtype=np.float32)
    np.savez(tmp_path / "x.npz", **{f"m{index}": values for index in range(8)})
    parse, free, overlaps = npy.read_array_header_1_0, threading.Lock(), []

    def watched(stream: IO[bytes]) -> tuple:
        alone = free.acquire(blocking=False)
        overlaps.append(not alone)
        time.sleep(0.01)
        if alone:
            free.release()
        return parse(stream)

    monkeypatch.setattr(npy, "read_array_header_1_0", watched)
    file = NpzFile(tmp_path / "x.npz")
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(file.array, sorted(file.keys)):
            np.testing.assert_array_equal(found, values)
    assert overlaps == [False] * 8


def npz_entry(path: Path, content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> NpzFile:
    """An archive with one array `m`, whose bytes are `content`."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("m.npy", content)
    return NpzFile(path)


def npy_header(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        npy_header("(1000000000, 1000)"),
        npy_header("(-1,)"),
        npy_header("(1,)", "'|O'") + bytes(8),
        npy_header("(1,)", "'<U1'") + bytes(4),
        npy_header("(1,)", "[('a', '<f4')]") + bytes(4),
        npy_header("(" * 5000),
        b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(100),
        b"\x93NUMPY\x01\x00",
        b"",
        bytes(1 << 20),
    ],
)
def test_headers_that_lie_are_refused_before_data_is_read(tmp_path: Path, content: bytes) -> None:
    file = npz_entry(tmp_path / "x.npz", content)
    for read in (file.array, file.shape, file.floats, lambda key: list(file.rows(key, 4))):
        with pytest.raises(MptTrtError, match="delete it and calibrate the model again"):
            read("m")


def test_an_array_of_more_values_than_expected_is_not_unpacked(tmp_path: Path) -> None:
    """A compressed kilobyte stands for each megabyte."""
    content = npy_header("(25000000,)") + bytes(100_000_000)
    file = npz_entry(tmp_path / "x.npz", content)
    tracemalloc.start()
    with pytest.raises(MptTrtError, match="holds 25000000 values, more than 2"):
        file.array("m", most=2)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])
def test_archives_of_any_kind_end_in_a_sentence(tmp_path: Path, compression: int) -> None:
    """Archives are encrypted, of another version or compression, damaged, or cut off anywhere."""
    npz_entry(tmp_path / "x.npz", npy_header("(2, 2)") + bytes(16), compression)
    content = (tmp_path / "x.npz").read_bytes()
    for place in range(len(content)):
        for changed in (
            content[:place],
            content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :],
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
        ):
            (tmp_path / "x.npz").write_bytes(changed)
            try:
                file = NpzFile(tmp_path / "x.npz")
                file.shape("m")
                list(file.rows("m", 1))
                file.floats("m")
            except MptTrtError:
                continue


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    """A pipe would wait for its writer, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe.npz")
    for path in (tmp_path / "pipe.npz", Path("/dev/zero")):
        with pytest.raises(MptTrtError, match=f"^{path}: a pipe or device, not an npz file; "):
            NpzFile(path)
