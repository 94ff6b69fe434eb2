"""Runs work in a second thread while the caller continues."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs functions in order in one other thread, at most one at a time."""

    def __init__(self, thread: ThreadPoolExecutor):
        self._thread = thread
        self._running: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Waits for the running work, whose errors it raises, and starts `work`."""
        self.wait()
        self._running = self._thread.submit(work)

    def wait(self) -> None:
        """Waits for the running work; raises its errors."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


@contextlib.contextmanager
def background() -> Iterator[Background]:
    """Ends all started work, and raises its errors, when the block is left.

    An error of the block itself takes precedence.
    """
    with ThreadPoolExecutor(1) as thread:
        work = Background(thread)
        yield work
        work.wait()
