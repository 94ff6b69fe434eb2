"""Runs a scheduler in a thread, for requests from other threads."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Literal

from mpt_trt.errors import MptTrtError
from mpt_trt.scheduling.scheduler import Request, Scheduler

log = logging.getLogger(__name__)

OnFailure = Literal["continue", "exit"]
"""Reaction to a failed step, which ends all running requests: waiting requests run, or nothing."""


class Worker:
    """Owns a scheduler; all methods can be called from any thread.

    Callbacks of requests run in the worker's thread and must be quick.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        on_failure: OnFailure = "continue",
        on_idle: Callable[[], None] | None = None,
        idle_seconds: float | None = None,
    ):
        """Takes a scheduler that no other thread uses from now on.

        on_idle: called every `idle_seconds` while there is nothing else to do.
        """
        self._scheduler, self._on_failure, self._on_idle = scheduler, on_failure, on_idle
        self._idle_seconds = idle_seconds
        self._actions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_stopping = self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: Exception | None = None
        """The failure that ended the worker."""

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._has_ended

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises MptTrtError when the model cannot run it, or when the worker has ended.
        """
        self._scheduler.require_fitting(request)
        self._actions.put(lambda: self._add(request))
        # After `put`, so that the thread has not taken its last actions before both.
        if self._has_ended:
            raise _stopped()

    def cancel(self, request: Request) -> None:
        """Ends a request; its `on_end` is not called."""
        self._actions.put(lambda: self._use_engine(lambda: self._scheduler.cancel(request)))

    def stop(self, is_drained: bool = True) -> None:
        """Ends the thread, after all requests if `is_drained`, otherwise with an error for each."""
        self._actions.put(lambda: self._stop(is_drained))

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def _add(self, request: Request) -> None:
        if self._is_stopping:
            request.on_end(_stopped())
        else:
            self._scheduler.add(request)

    def _stop(self, is_drained: bool) -> None:
        self._is_stopping = True
        if not is_drained:
            self._scheduler.fail(_stopped(), with_waiting=True)

    def _run(self) -> None:
        try:
            while self._is_needed():
                self._take_actions()
                self._use_engine(self._scheduler.run_once)
        except Exception as error:
            self.failure = error
            log.exception("the engine's thread has failed")
        finally:
            self._is_stopping = True
            self._scheduler.fail(self.failure or _stopped(), with_waiting=True)
            self._has_ended = True
            while not self._actions.empty():
                self._actions.get()()
            self._scheduler.deliver()

    def _is_needed(self) -> bool:
        return not (self._is_stopping and self._scheduler.is_idle)

    def _take_actions(self) -> None:
        """Runs actions that other threads requested; waits for one if there is no other work."""
        if self._scheduler.is_idle:
            self._scheduler.deliver()
        is_first = True
        while not self._actions.empty() or (is_first and self._scheduler.is_idle):
            is_first = False
            try:
                self._actions.get(timeout=self._idle_seconds)()
            except queue.Empty:
                if self._on_idle is not None:
                    self._on_idle()

    def _use_engine(self, part: Callable[[], None]) -> None:
        """Runs a part of the scheduler that uses the engine, which may fail."""
        try:
            part()
        except Exception as error:
            if self._on_failure == "exit":
                raise
            log.exception(
                "a step of the engine failed; %d requests end", self._scheduler.num_running
            )
            self._scheduler.fail(error, with_waiting=False)
            self._scheduler.restart()


def _stopped() -> MptTrtError:
    return MptTrtError("the engine was stopped")
