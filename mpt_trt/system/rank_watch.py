"""Ends calls in which this rank waits in vain for others.

A call into a GPU's libraries does not return while another rank is missing, and Python cannot
interrupt it. So a thread looks at the clock.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpt_trt.errors import MptTrtError
from mpt_trt.system.mpi import end_all_ranks, rank_label, timed_out

INTERVAL_SECONDS = 0.5
# Time for a call to return after its interruption, before the process ends without that.
GRACE_SECONDS = 10.0


class RankWatch:
    """Watches the calls of one thread; must be closed.

    interrupt: makes a waiting call return, with any result; called once, from another thread.
    find_fault: describes a failure of the connection between ranks; None if there is none.
    """

    def __init__(
        self,
        patience_seconds: float,
        interrupt: Callable[[], None],
        find_fault: Callable[[], str | None],
    ):
        self._patience_seconds = patience_seconds
        self._interrupt, self._find_fault = interrupt, find_fault
        self._started: float | None = None
        self._failure: MptTrtError | None = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
        self._thread.start()

    @contextmanager
    def limit(self) -> Iterator[None]:
        """Encloses a call that may wait for other ranks; raises MptTrtError if it was in vain."""
        self._raise_failure()
        self._started = time.monotonic()
        try:
            yield
        except Exception:
            # The call's own error is only a consequence.
            self._raise_failure()
            raise
        finally:
            self._started = None
        self._raise_failure()

    def close(self) -> None:
        """Ends the watch; afterwards, nothing is interrupted."""
        self._is_closed.set()
        # At the end of the program, the thread no longer runs.
        if threading.current_thread() is not self._thread and not sys.is_finalizing():
            self._thread.join(GRACE_SECONDS)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while not self._is_closed.wait(min(INTERVAL_SECONDS, self._patience_seconds / 4)):
            if (failure := self._find_failure()) is not None:
                self._failure = failure
                stuck = threading.Timer(GRACE_SECONDS, self._end_if_stuck, (self._started,))
                stuck.daemon = True
                stuck.start()
                self._interrupt()
                return

    def _find_failure(self) -> MptTrtError | None:
        started = self._started
        if started is not None and time.monotonic() - started > self._patience_seconds:
            return timed_out(self._patience_seconds)
        fault = self._find_fault()
        return None if fault is None else MptTrtError(fault)

    def _end_if_stuck(self, started: float | None) -> None:
        if started is not None and self._started == started:
            print(f"error{rank_label()}: {self._failure}", file=sys.stderr, flush=True)
            end_all_ranks(1)
            os._exit(1)
