"""Runs jobs in parallel processes.

Threads would wait for each other: for Python's lock between the many short calls that handle a
block, and for the kernel's lock of the shared address space that files are mapped into.
`concurrent.futures` is slower and does not report the signal that killed a process
(docs/appendix/experiments.md).
"""

from __future__ import annotations

import gc
import os
import pickle
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from mpt_trt.errors import MptTrtError
from mpt_trt.system.process import end_with_parent

Result = TypeVar("Result")
Advance = Callable[[int], None]
Job = Callable[[Advance], Result]

MOST_PROCESSES = 1024
INDEX_BYTES = 4
# Maximum size of a message in bytes.
MESSAGE_BYTES = 1 << 20
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class _Worker:
    """A worker process and the socket that receives its messages.

    Messages are pickled: a number is progress, a tuple contains a job's result, an exception is the
    reason for the end of the process.
    """

    pid: int
    messages: socket.socket

    def receive(self) -> int | tuple[Any] | None:
        """Receives the next message; None when the process has no more jobs.

        Raises the exception of a job, and MptTrtError when the process was killed.
        """
        content = self.messages.recv(MESSAGE_BYTES)
        if not content:
            self._require_regular_end()
            return None
        message: int | tuple[Any] | BaseException = pickle.loads(content)
        if isinstance(message, BaseException):
            raise message
        return message

    def end(self) -> None:
        """Kills the process, if it still runs."""
        self.messages.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def _require_regular_end(self) -> None:
        # WNOWAIT: `end` can still wait for the process.
        state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert state is not None
        if state.si_code != os.CLD_EXITED:
            raise MptTrtError(
                f"a process of this program was ended by {signal.Signals(state.si_status).name}, "
                "possibly by the system for lack of memory; run it again with fewer --processes"
            )
        if state.si_status != 0:
            raise RuntimeError(f"a process ended with status {state.si_status} and no message")


@dataclass(frozen=True)
class _Turns:
    """A pipe with the number of the next job; a worker that reads it writes the following one."""

    reading: int
    writing: int

    def put(self, number: int) -> None:
        os.write(self.writing, number.to_bytes(INDEX_BYTES, "little"))

    def take(self) -> int:
        number = int.from_bytes(os.read(self.reading, INDEX_BYTES), "little")
        self.put(number + 1)
        return number

    def close(self) -> None:
        os.close(self.reading)
        os.close(self.writing)


def run_forked(jobs: Sequence[Job[Result]], num_processes: int, advance: Advance) -> list[Result]:
    """Runs the jobs and returns their results, in any order.

    Each job runs in one of the processes and receives a function that reports its progress;
    `advance` is called with that progress in this process. No process is left when this returns or
    raises.

    num_processes: 0 runs the jobs in this process, which is faster for small jobs, because a fork
    of a large process takes longer than they do.

    Raises the first exception of a job or of `advance`, and MptTrtError when a process is killed.
    """
    if num_processes == 0:
        return [job(advance) for job in jobs]
    results: list[Result] = []
    with _workers(jobs, num_processes) as workers, selectors.DefaultSelector() as running:
        for worker in workers:
            running.register(worker.messages, selectors.EVENT_READ, worker)
        while len(results) < len(jobs):
            for key, _ in running.select():
                message = key.data.receive()
                if message is None:
                    running.unregister(key.fileobj)
                elif isinstance(message, int):
                    advance(message)
                else:
                    results += message
    return results


@contextmanager
def _workers(jobs: Sequence[Job[Any]], number: int) -> Iterator[list[_Worker]]:
    """Starts processes that share the jobs, and ends them when the block is left."""
    workers: list[_Worker] = []
    with ExitStack() as stack:
        turns = _Turns(*os.pipe())
        stack.callback(turns.close)
        turns.put(0)
        # An interrupt between these lines would leave an unknown process.
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
        try:
            for _ in range(min(number, len(jobs))):
                workers.append(_forked(jobs, turns))
                stack.callback(workers[-1].end)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        yield workers


def _forked(jobs: Sequence[Job[Any]], turns: _Turns) -> _Worker:
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        # The parent's garbage stays. An ONNX Runtime session in it would wait for its threads,
        # which a fork does not copy.
        gc.freeze()
        # Neither `finally` blocks nor exit handlers of the parent may run here.
        try:
            end_with_parent()
            if os.getppid() == parent:  # otherwise the parent ended before `end_with_parent`
                _work(jobs, turns, sender)
        finally:
            os._exit(1)
    sender.close()
    return _Worker(pid, receiver)


def _work(jobs: Sequence[Job[Any]], turns: _Turns, sender: socket.socket) -> None:
    """Takes jobs until there are no more, then ends the process."""
    # An interrupt reaches all processes; the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    if (torch := sys.modules.get("torch")) is not None:
        # A fork does not copy PyTorch's threads, for which it would wait. Its loaders do the same.
        torch.set_num_threads(1)

    def send(message: object) -> None:
        sender.send(pickle.dumps(message))

    try:
        while (number := turns.take()) < len(jobs):
            send((jobs[number](send),))
    except BaseException as error:
        error.add_note(f"In one of several processes:\n{traceback.format_exc()}")
        send(error)
    os._exit(0)
