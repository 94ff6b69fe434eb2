"""Progress as lines, for logs and other outputs without a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

INTERVAL_SECONDS = 10.0


class Advance(Protocol):
    """Function that adds an amount of finished work; any thread may call it."""

    def __call__(self, count: float = 1, /) -> None: ...


def no_progress(count: float = 1, /) -> None:
    """Ignores the progress of a step."""


class ProgressLines:
    """Prints the progress of a step to stderr: every ten seconds, and at the end.

    shown: formats an amount; amounts have the unit of `total`, which may be more than there is to
    do. Threads may share an object.
    """

    def __init__(self, title: str, total: float, shown: Callable[[float], str]):
        self._title, self._total, self._shown = title, total, shown
        self._done = 0.0
        self._started = self._printed = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, count: float = 1, /) -> None:
        """Adds an amount of finished work, and prints a line if the last one is old."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._printed < INTERVAL_SECONDS or self._done >= self._total:
                return
            self._printed = now
            seconds = now - self._started
            left = seconds * (self._total - self._done) / self._done
            percent = 100 * self._done / self._total
            times = f"{in_time(seconds)}, about {in_time(left)} left"
            say(f"{self._title}: {self._amounts()} ({percent:.0f} %), {times}")

    def stop(self) -> None:
        """Prints the last line, after everything was done."""
        seconds = time.monotonic() - self._started
        is_exact = self._done == self._total
        amounts = self._amounts() if is_exact else self._shown(self._done)
        say(f"{self._title}: {amounts} in {in_time(seconds)}")

    def _amounts(self) -> str:
        return f"{self._shown(self._done)} of {self._shown(self._total)}"


def say(line: str) -> None:
    """Prints a line to stderr at once."""
    print(line, file=sys.stderr, flush=True)


def in_time(seconds: float) -> str:
    """Formats a duration: `0.4 s`, `42 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
