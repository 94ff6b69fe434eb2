"""Reads result files: JSON objects that were written from dataclasses."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json

Result = TypeVar("Result")


def read_result(path: Path, kind: type[Result], description: str) -> Result:
    """Reads a dataclass, with dataclasses and tuples inside; keys that it lacks are ignored.

    description: of the expected content, for error messages.

    Raises MptTrtError when a key is missing or a value is not an object where one is expected.
    """
    content = read_json(path)
    try:
        return _dataclass(kind, content)
    except (KeyError, TypeError) as error:
        raise MptTrtError(
            f"{path}: not {description} of this version, or damaged ({error!r}); "
            "delete it and measure again"
        ) from None


def _dataclass(kind: type[Result], content: dict[str, Any]) -> Result:
    fields = get_type_hints(kind).items()
    return kind(**{name: _value(hint, content[name]) for name, hint in fields})


def _value(hint: Any, value: Any) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, value)
    if get_origin(hint) is tuple:
        return tuple(_value(get_args(hint)[0], item) for item in value)
    return value
