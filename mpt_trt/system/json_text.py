"""Parses JSON from untrusted files, and rejects content that mpt-trt's files never have."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from mpt_trt.errors import MptTrtError

# Far above the size of real files: the index of the largest models has about 100 kB.
MOST_BYTES = 16 << 20
MOST_DEPTH = 64
# transformers writes 1e30 as an integer for a tokenizer without a maximum length.
MOST_DIGITS = 31


def parse_json_object(text: bytes, path: Path, remedy: str) -> dict[str, Any]:
    """Parses a JSON object with integers of up to 31 digits and up to 64 levels.

    Numbers may be infinite or NaN, as in Python's own dialect: who reads a number checks it.
    path, remedy: for error messages.

    Raises MptTrtError, naming the file, when `text` is anything else.
    """
    if len(text) > MOST_BYTES:
        raise MptTrtError(f"{path}: larger than {MOST_BYTES >> 20} MiB of JSON; {remedy}")
    if text.startswith(codecs.BOM_UTF8):
        raise MptTrtError(f"{path}: begins with a byte order mark; save it as UTF-8 without BOM")
    try:
        content = json.loads(text.decode("utf-8"), parse_int=_integer)
        _require_shallow(content)
    except RecursionError:
        raise MptTrtError(
            f"{path}: not valid JSON (nested more than {MOST_DEPTH} levels deep); {remedy}"
        ) from None
    except UnicodeDecodeError as error:
        raise MptTrtError(f"{path}: cannot be read (not UTF-8: {error}); {remedy}") from None
    except ValueError as error:
        raise MptTrtError(f"{path}: not valid JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise MptTrtError(
            f"{path}: expected a JSON object, found {type(content).__name__}; {remedy}"
        )
    return content


def shown(value: object) -> str:
    """A value of a file, cut to a length that fits into an error message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _integer(digits: str) -> int:
    count = len(digits.lstrip("-"))
    if count > MOST_DIGITS:
        raise ValueError(f"an integer of {count} digits")
    return int(digits)


def _require_shallow(content: object) -> None:
    level, depth = [content], 0
    while level := [
        item
        for value in level
        if isinstance(value, list | dict)
        for item in (value.values() if isinstance(value, dict) else value)
    ]:
        depth += 1
        if depth > MOST_DEPTH:
            raise RecursionError
