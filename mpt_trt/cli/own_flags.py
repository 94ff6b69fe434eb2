"""Errors of the library in the words of a tool: names of parameters become its flags."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mpt_trt.errors import MptTrtError


@contextmanager
def own_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Replace names in the messages of errors by the flags that a tool has for them."""
    try:
        yield
    except MptTrtError as error:
        text = str(error)
        for name, flag in flags.items():
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", flag, text)
        raise type(error)(text) from None
