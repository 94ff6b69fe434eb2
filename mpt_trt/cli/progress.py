"""Shows progress on stderr, as a bar on a terminal or as lines.

The library that draws bars takes 0.05 s to import, a fifth of a small conversion. So it is imported
only for a terminal, when a bar first advances.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mpt_trt.system.progress_lines import Advance, ProgressLines

if TYPE_CHECKING:
    from rich.progress import Progress


def bytes_progress(title: str, total_bytes: int) -> contextlib.AbstractContextManager[Advance]:
    """Progress in bytes, with rate and time; yields the function that advances it."""
    lines = ProgressLines(title, total_bytes, _in_units)
    return _progress(lines, lambda: _bytes_bar(title, total_bytes))


def steps_progress(title: str, total: int) -> contextlib.AbstractContextManager[Advance]:
    """Progress in steps, with times; yields the function that advances it."""
    lines = ProgressLines(title, total, lambda count: f"{count:.0f}")
    return _progress(lines, lambda: _steps_bar(title, total))


@contextlib.contextmanager
def _progress(lines: ProgressLines, start_bar: Callable[[], Progress]) -> Iterator[Advance]:
    shown: _LazyBar | ProgressLines = _LazyBar(start_bar) if sys.stderr.isatty() else lines
    try:
        yield shown.advance
    except BaseException:
        # An error message comes last.
        if isinstance(shown, _LazyBar):
            shown.stop()
        raise
    shown.stop()


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

    def advance(self, count: float = 1, /) -> None:
        with self._lock:
            if self._progress is None:
                self._progress = self._start()
        (task,) = self._progress.task_ids
        self._progress.advance(task, count)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _bytes_bar(title: str, total_bytes: int) -> Progress:
    from mpt_trt.cli.terminal import bytes_bar

    return bytes_bar(title, total_bytes)


def _steps_bar(title: str, total: int) -> Progress:
    from mpt_trt.cli.terminal import steps_bar

    return steps_bar(title, total)
