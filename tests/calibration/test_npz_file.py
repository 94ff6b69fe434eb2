"""Arrays of an npz archive: in blocks of rows, damaged, and read by several threads."""

from __future__ import annotations

import threading
import time
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
