"""Work in a second thread, beside the caller's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Runs functions in order, in one other thread, at most one behind the caller."""

    def __init__(self, thread: ThreadPoolExecutor):
        self._thread = thread
        self._running: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Waits for what runs, and starts `work`; raises what the former raised."""
        self.wait()
        self._running = self._thread.submit(work)

    def wait(self) -> None:
        """Returns when nothing runs any more; raises what the work raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


@contextlib.contextmanager
def background() -> Iterator[Background]:
    """All that was started has ended when the block is left, and its errors have been raised.

    An error of the block itself goes before those of the work.
    """
    with ThreadPoolExecutor(1) as thread:
        work = Background(thread)
        yield work
        work.wait()
