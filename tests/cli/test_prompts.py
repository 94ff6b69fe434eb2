"""Prompts in users' files: accepted, trimmed and rejected content."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from mpt_trt.cli.prompts import encoded, read_ids, read_texts
from mpt_trt.errors import MptTrtError

END, PAD = 0, 3
PADDING = {END, PAD}


def as_npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\r\n\r\ntwo", ["one", "two"]),
        # Characters that str.splitlines would also split at.
        (
            "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh\n".encode(),
            ["a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh"],
        ),
        (b"  indented \n", ["  indented "]),
    ],
)
def test_texts(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert read_texts(path) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "contains no prompt"),
        (b"\xef\xbb\xbf", "contains no prompt"),
        (b"\n\r\n", "contains no prompt"),
        (b"caf\xe9\n", "not UTF-8 text"),
        ("text".encode("utf-16"), "not UTF-8 text"),
        ("text".encode("utf-16-le"), "not a text, because it contains NUL characters"),
    ],
)
def test_texts_that_are_rejected(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(MptTrtError, match=rf"prompts\.txt: {reason}"):
        read_texts(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"5,17\n7\n", [[5, 17], [7]]),
        (b"\xef\xbb\xbf5, 17\r\n\r\n7\r\n", [[5, 17], [7]]),
        # The end token is padding only in arrays.
        (b"5,0\n", [[5, 0]]),
    ],
)
def test_csv(tmp_path: Path, content: bytes, expected: list[list[int]]) -> None:
    path = tmp_path / "prompts.csv"
    path.write_bytes(content)
    assert read_ids(path, PADDING) == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[5, 17, 99, 12], [7, 8, 0, 0]], [[5, 17, 99, 12], [7, 8]]),
        ([[7, 8, 3, 3]], [[7, 8]]),
        ([[7, 0, 3, 3]], [[7]]),
        ([[0, 0, 7, 8]], [[7, 8]]),
        ([[7, 0, 8, 0]], [[7, 0, 8]]),
        ([5, 17, 99], [[5, 17, 99]]),
        # The output of run.py for two prompts with two beams each.
        ([[[5, 17], [6, 0]], [[7, 8], [9, 0]]], [[5, 17], [6], [7, 8], [9]]),
    ],
)
def test_arrays(tmp_path: Path, dtype: type, rows: list, expected: list[list[int]]) -> None:
    path = tmp_path / "prompts.npy"
    path.write_bytes(as_npy(np.array(rows, dtype)))
    assert read_ids(path, PADDING) == expected


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"", "contains no prompt"),
        ("a.csv", b"5,1.0\n", "cannot be read as prompts: line 1: '1.0' is not an integer"),
        ("a.csv", b"5,,6\n", "cannot be read as prompts"),
        ("a.csv", b"5,1_0\n", "line 1: '1_0' is not an integer; write one row of token ids per"),
        ("a.csv", "5,\u0661\n".encode(), "line 1: '\u0661' is not an integer"),
        ("a.csv", b"9" * 5000, "is not an integer"),
        ("a.csv", b"5,-1\n", "prompt 0: -1 is not a token id"),
        ("a.csv", b"5\n6,70000000000\n", "prompt 1: 70000000000 is not a token id"),
        ("a.npy", b"", "cannot be read as prompts"),
        ("a.npy", b"no array", "cannot be read as prompts"),
        ("a.npy", as_npy(np.array([[5.0, 17.0]])), "an array of float64; token ids are integers"),
        ("a.npy", as_npy(np.array([[True]])), "an array of bool; token ids are integers"),
        ("a.npy", as_npy(np.array([["5"]])), "an array of <U1; token ids are integers"),
        ("a.npy", as_npy(np.array([[5, {}]]), True), "cannot be read as prompts"),
        ("a.npy", as_npy(np.array(5)), "an array of 0 dimensions; 1 to 3 are read"),
        ("a.npy", as_npy(np.zeros((1, 1, 1, 1), int)), "an array of 4 dimensions"),
        ("a.npy", as_npy(np.zeros((0, 4), int)), "contains no prompt"),
        ("a.npy", as_npy(np.array([[5, 6], [0, 3]])), "prompt 1 is empty"),
        ("a.npy", as_npy(np.array([[2**63]], np.uint64)), "is not a token id"),
        ("a.npy", as_npy(np.array([[5, 6]]))[:-8], "cannot be read as prompts"),
    ],
)
def test_files_that_are_rejected(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MptTrtError, match=rf"a\.(csv|npy): .*{reason}"):
        read_ids(path, PADDING)


@pytest.mark.parametrize(
    ("begin", "row", "expected"),
    [
        (END, [0, 7, 8, 0, 0], [0, 7, 8]),
        (END, [0, 0, 7, 8], [7, 8]),
        (END, [3, 7, 8], [7, 8]),
        (END, [0, 0, 0, 0], None),
        (1, [0, 7, 8], [7, 8]),
        (1, [1, 7, 8], [1, 7, 8]),
        (None, [0, 7, 8], [7, 8]),
    ],
)
def test_a_token_that_begins_a_text_is_no_padding(
    tmp_path: Path, begin: int | None, row: list[int], expected: list[int] | None
) -> None:
    path = tmp_path / "prompts.npy"
    path.write_bytes(as_npy(np.array([row])))
    if expected is None:
        with pytest.raises(MptTrtError, match="prompt 0 is empty"):
            read_ids(path, PADDING, begin)
    else:
        assert read_ids(path, PADDING, begin) == [expected]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # A prompt without it shows that the others have padding there.
        ([[7, 8], [0, 9]], [[7, 8], [9]]),
        ([[7, 8, 9], [0, 7, 0]], [[7, 8, 9], [7]]),
        ([[0, 7, 8], [0, 9, 0]], [[0, 7, 8], [0, 9]]),
        ([[0, 7, 8], [0, 0, 9]], [[0, 7, 8], [0, 9]]),
        ([[0, 7, 8], [3, 0, 9]], [[0, 7, 8], [0, 9]]),
        ([[0, 0, 7], [0, 0, 9]], [[7], [9]]),
    ],
)
def test_arrays_are_padded_on_one_side(
    tmp_path: Path, rows: list[list[int]], expected: list[list[int]]
) -> None:
    path = tmp_path / "prompts.npy"
    path.write_bytes(as_npy(np.array(rows)))
    assert read_ids(path, PADDING, END) == expected


def test_an_archive_of_arrays_is_rejected(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.array([5]))
    path = (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(MptTrtError, match=r"a\.npy: cannot be read as prompts: an archive"):
        read_ids(path, PADDING)


def test_empty_texts_are_rejected() -> None:
    with pytest.raises(MptTrtError, match="prompt 1 is empty"):
        encoded(["a", ""], lambda text: [len(text)])
