"""Reads prompts from command lines and files, as token ids."""

from __future__ import annotations

import csv
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_small_file, require_no_nul
from mpt_trt.system.json_text import shown

MOST_TEXT_BYTES = 1 << 30
# Larger than any vocabulary.
MOST_ID = 2**31 - 1
# Longer numbers are no ids, and take long to read.
INTEGER = re.compile(r"\s*[+-]?[0-9]{1,30}\s*")

TEXT_SUFFIX, IDS_SUFFIXES, CHAT_SUFFIX = ".txt", (".csv", ".npy"), ".json"


def read_texts(path: Path) -> list[str]:
    """Reads the lines of a UTF-8 file, which end with LF or CRLF; empty lines are left out.

    Raises MptTrtError when the file is not UTF-8 or contains no text.
    """
    content = read_small_file(path, MOST_TEXT_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MptTrtError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from None
    require_no_nul(path, text)
    if not (lines := [line for line in re.split("\r?\n", text) if line]):
        raise MptTrtError(f"{path}: contains no prompt; write one text per line")
    return lines


def read_ids(path: Path, padding: set[int], begin: int | None = None) -> list[list[int]]:
    """Reads prompts from a .csv or .npy file with one row of token ids per prompt.

    padding: ids that are removed at both ends of an array's rows. begin: the one that begins
    a text, if any; one stays at the start of each row if no row begins with another token.

    Raises MptTrtError when the file contains anything other than integers, or an empty prompt.
    """
    try:
        rows = _csv_rows(path) if path.suffix == ".csv" else _array_rows(path, padding, begin)
    except (OSError, ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise MptTrtError(
            f"{path}: cannot be read as prompts: {error}; write one row of token ids per prompt"
        ) from None
    if not rows:
        raise MptTrtError(f"{path}: contains no prompt; write one row of token ids per prompt")
    for index, row in enumerate(rows):
        if not row:
            raise MptTrtError(f"{path}: prompt {index} is empty; write at least one token id")
        for token in row:
            if not 0 <= token <= MOST_ID:
                raise MptTrtError(
                    f"{path}: prompt {index}: {token} is not a token id (0 to {MOST_ID})"
                )
    return rows


def _csv_rows(path: Path) -> list[list[int]]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        try:
            reader = csv.reader(stream)
            return [[_cell(cell, reader.line_num) for cell in row] for row in reader if row]
        except csv.Error as error:
            raise ValueError(str(error)) from None


def _cell(text: str, line: int) -> int:
    # int() also reads digits of other scripts, and 1_0 as 10.
    if not INTEGER.fullmatch(text):
        raise ValueError(f"line {line}: {shown(text)} is not an integer")
    return int(text)


def _array_rows(path: Path, padding: set[int], begin: int | None) -> list[list[int]]:
    try:
        # Mapped, so that a header with a wrong size allocates nothing.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy lets Python parse the header
        raise ValueError(shown(str(error))) from None
    if not isinstance(array, np.ndarray):
        raise TypeError("an archive instead of one array")
    if array.dtype.kind not in "iu":
        raise TypeError(f"an array of {array.dtype}; token ids are integers")
    if array.ndim not in (1, 2, 3):
        raise TypeError(f"an array of {array.ndim} dimensions; 1 to 3 are read")
    rows = array.reshape(-1, array.shape[-1]).tolist() if array.size else []
    return _without_padding(rows, padding, begin)


def _without_padding(
    rows: list[list[int]], padding: set[int], begin: int | None
) -> list[list[int]]:
    # Many tokenizers begin a text with the token that also ends it, so one of these may be a
    # prompt's own. It is if all prompts have it, and the longest one has no other padding there.
    kept = [[index for index, token in enumerate(row) if token not in padding] for row in rows]
    is_begun = min((places[0] for places in kept if places), default=0) == 1
    return [
        row[places[0] - (is_begun and row[places[0] - 1] == begin) : places[-1] + 1]
        if places
        else []
        for row, places in zip(rows, kept, strict=True)
    ]


def encoded(texts: list[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Converts each text to token ids; raises MptTrtError when a text is empty."""
    for index, text in enumerate(texts):
        if not text:
            raise MptTrtError(f"prompt {index} is empty; give at least one character")
    return [encode(text) for text in texts]
