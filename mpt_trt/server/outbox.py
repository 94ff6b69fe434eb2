"""Passes what the worker's thread makes to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Outbox:
    """Calls for the event loop, which it makes together when the worker's thread flushes them.

    Waking the loop takes longer than generating a token. While it runs, the worker's thread waits
    for the interpreter, so it flushes when the device has the next step.

    loop: set by the event loop's thread before the worker's first call.
    """

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._calls: list[Callable[[], None]] = []

    def put(self, receive: Callable[[T], None], value: T) -> None:
        """Adds a call of a function with a value. Only for the worker's thread."""
        self._calls.append(lambda: receive(value))

    def flush(self) -> None:
        """Lets the event loop make the calls, in order. Only for the worker's thread."""
        if not self._calls or self.loop is None:
            return
        calls, self._calls = self._calls, []
        # A loop that is closed has nobody who waits any more.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(_make, calls)


def _make(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
