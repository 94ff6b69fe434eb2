"""Makes dataclasses from JSON, and rejects values whose type differs from the field's."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mpt_trt.system.json_text import shown

Made = TypeVar("Made")

PLAIN = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text"}
"""Words for field types, for error messages."""


def from_json(kind: type[Made], content: object, where: str = "") -> Made:
    """Makes a dataclass, with dataclasses, tuples and mappings inside; other keys are ignored.

    where: key of `content`, for error messages.

    Raises ValueError, naming the key, when one is missing or has a value of another type.
    """
    if not isinstance(content, dict):
        raise _unexpected(where, content, "an object")
    dataclass: Any = kind
    hints = _hints(dataclass)
    values = {}
    for name, has_default in _fields(dataclass):
        if name in content:
            values[name] = _value(hints[name], content[name], f"{where}.{name}" if where else name)
        elif not has_default:
            raise ValueError(f"{where}.{name} is missing" if where else f"{name} is missing")
    return kind(**values)


@functools.cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return get_type_hints(kind)


@functools.cache
def _fields(kind: Any) -> tuple[tuple[str, bool], ...]:
    return tuple(
        (f.name, f.default is not MISSING or f.default_factory is not MISSING) for f in fields(kind)
    )


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, where)
    if hint in PLAIN:
        return _plain(hint, value, where)
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, where)
    if origin is Literal:
        if not any(value == known and type(value) is type(known) for known in arguments):
            raise _unexpected(where, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin in (tuple, list):
        return origin(_items(arguments[0] if arguments else Any, value, where))
    if origin is dict:
        return _mapping(arguments[1] if arguments else Any, value, where)
    raise TypeError(f"{where} has a type that JSON does not have: {hint}")


def _plain(kind: type, value: Any, where: str) -> Any:
    accepted = (int, float) if kind is float else kind
    is_right = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    if not is_right or (isinstance(value, float) and not math.isfinite(value)):
        raise _unexpected(where, value, PLAIN[kind])
    return value


def _one_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    (hint,) = (hint for hint in hints if hint is not type(None))
    return _value(hint, value, where)


def _items(hint: Any, value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _unexpected(where, value, "a list")
    return [_value(hint, item, f"{where}[{index}]") for index, item in enumerate(value)]


def _mapping(hint: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _unexpected(where, value, "an object")
    return {key: _value(hint, item, f"{where}.{shown(key)}") for key, item in value.items()}


def _unexpected(where: str, value: object, expected: str) -> ValueError:
    return ValueError(f"{where or 'the content'} = {shown(value)}: {expected} is expected")
