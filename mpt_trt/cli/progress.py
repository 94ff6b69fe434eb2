"""Progress in bytes on stderr, which imports what draws bars only where there is a terminal."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


@contextlib.contextmanager
def bytes_progress(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with bytes, rate and time; yields the function that advances it.

    The bar appears with the first step: one thread then imports the library that draws it, while
    others work. Without a terminal, there is one line at the end.
    """
    bar: _LazyBar | _Line
    if sys.stderr.isatty():
        bar = _LazyBar(lambda: _start_bar(title, total_bytes))
    else:
        bar = _Line(title, total_bytes)
    try:
        yield bar.advance
    finally:
        bar.stop()


class _Line:
    """One line at the end, without the library that draws bars."""

    def __init__(self, title: str, total_bytes: int):
        self._title, self._total = title, total_bytes
        self._done = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count

    def stop(self) -> None:
        # Never 0, by which the rate is divided.
        seconds = max(time.monotonic() - self._started, 1e-9)
        done, total, rate = map(_in_units, (self._done, self._total, self._done / seconds))
        print(f"{self._title}: {done} of {total} in {seconds:.1f} s, {rate}/s", file=sys.stderr)


def _in_units(size: float) -> str:
    units = ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}"


class _LazyBar:
    """Progress bar that is made when it first advances."""

    def __init__(self, start: Callable[[], Progress]):
        self._start = start
        self._progress: Progress | None = None
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            if self._progress is None:
                self._progress = self._start()
        (task,) = self._progress.task_ids
        self._progress.advance(task, count)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _start_bar(title: str, total_bytes: int) -> Progress:
    # Rich takes 0.05 s to import, a fifth of what a small conversion takes.
    from mpt_trt.cli.terminal import bytes_bar

    return bytes_bar(title, total_bytes)
