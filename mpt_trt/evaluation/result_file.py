"""Reads result files, JSON objects that were written from dataclasses."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json
from mpt_trt.system.typed_json import from_json

Result = TypeVar("Result")


def read_result(path: Path, kind: type[Result], description: str) -> Result:
    """Reads a dataclass, with dataclasses and tuples inside; other keys are ignored.

    description: expected content, for error messages.

    Raises MptTrtError, naming the key, when one is missing or has a value of another type.
    """
    content = read_json(path)
    try:
        return from_json(kind, content)
    except ValueError as error:
        raise MptTrtError(
            f"{path}: not {description} of this version, or damaged ({error}); "
            "delete it and measure again"
        ) from None
