"""Jobs in separate processes: results, progress, errors, and no processes that are left."""

from __future__ import annotations

import errno
import faulthandler
import functools
import gc
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Callable

import pytest
import torch

from mpt_trt.errors import MptTrtError
from mpt_trt.system.process import end_with_parent
from mpt_trt.system.process_pool import Advance, run_forked


def ignore(_: int) -> None:
    pass


def square(number: int, advance: Advance) -> tuple[int, int]:
    """The square, and which process found it."""
    advance(number)
    return number**2, os.getpid()


def wait_for_ever(advance: Advance) -> None:
    """Tells its process id as progress."""
    advance(os.getpid())
    time.sleep(600)


def failing(error: Exception) -> Callable[[Advance], None]:
    def job(_: Advance) -> None:
        raise error

    return job


def ended(how: Callable[[], None]) -> Callable[[Advance], None]:
    return lambda _: how()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("num_processes", [1, 2, 3, 50])
@pytest.mark.parametrize("num_jobs", [0, 1, 7, 40])
def test_results_and_progress(num_jobs: int, num_processes: int) -> None:
    progress: list[int] = []
    jobs = [functools.partial(square, number) for number in range(num_jobs)]
    results = run_forked(jobs, num_processes, progress.append)
    assert sorted(square for square, _ in results) == [n**2 for n in range(num_jobs)]
    assert sorted(progress) == list(range(num_jobs))
    pids = {pid for _, pid in results}
    assert os.getpid() not in pids
    assert len(pids) <= num_processes
    assert not any(map(is_running, pids))


def test_no_other_process() -> None:
    progress: list[int] = []
    jobs = [functools.partial(square, number) for number in range(3)]
    results = run_forked(jobs, 0, progress.append)
    assert results == [(number**2, os.getpid()) for number in range(3)]
    assert progress == [0, 1, 2]
    error = ValueError("no")
    with pytest.raises(ValueError) as caught:
        run_forked([failing(error), *jobs], 0, progress.append)
    assert caught.value is error
    assert progress == [0, 1, 2]


def test_more_jobs_than_a_pipe_would_hold() -> None:
    jobs = [functools.partial(square, number) for number in range(20_000)]
    results = run_forked(jobs, 2, ignore)
    assert sorted(found for found, _ in results) == [n**2 for n in range(20_000)]


def test_jobs_run_side_by_side() -> None:
    """Each waits until all have begun."""
    barrier = multiprocessing.get_context("fork").Barrier(3)

    def meet(_: Advance) -> int:
        barrier.wait(timeout=60)
        return os.getpid()

    assert len(set(run_forked([meet] * 3, 3, ignore))) == 3


@pytest.mark.parametrize(
    "error", [MptTrtError("file: field: remedy"), OSError(errno.ENOSPC, "full"), KeyError("name")]
)
def test_an_error_of_a_job_is_raised_and_ends_the_others(error: Exception) -> None:
    started: list[int] = []
    waiting = multiprocessing.get_context("fork").Event()

    def listen(pid: int) -> None:
        started.append(pid)
        waiting.set()

    def fail_later(_: Advance) -> None:
        waiting.wait(timeout=60)
        raise error

    with pytest.raises(type(error)) as raised:
        run_forked([wait_for_ever, fail_later], 2, listen)
    assert raised.value.args == error.args
    assert "fail_later" in "".join(raised.value.__notes__)
    assert len(started) == 1
    assert not is_running(started[0])


def test_an_error_of_the_listener_ends_all() -> None:
    started: list[int] = []

    def listen(pid: int) -> None:
        started.append(pid)
        if len(started) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_forked([wait_for_ever] * 3, 2, listen)
    assert not any(map(is_running, started))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_killed_process(number: signal.Signals) -> None:
    def die() -> None:
        faulthandler.disable()  # pytest's, which prints where all stand
        os.kill(os.getpid(), number)

    jobs = [wait_for_ever, ended(die)]
    with pytest.raises(MptTrtError, match=rf"was ended by {number.name}.*fewer --processes"):
        run_forked(jobs, 2, ignore)


def test_a_process_that_says_nothing() -> None:
    with pytest.raises(RuntimeError, match="ended with status 3"):
        run_forked([ended(lambda: os._exit(3))], 1, ignore)


def test_an_error_that_cannot_be_told() -> None:
    class LocalError(Exception):
        """Error of a class that no other process can import."""

    with pytest.raises(RuntimeError, match="ended with status 1"):
        run_forked([failing(LocalError())], 1, ignore)


def test_what_the_caller_has_begun_is_not_ended_in_a_job() -> None:
    """A job that exits runs none of the caller's `finally`."""
    reading, writing = os.pipe()
    try:
        with pytest.raises(SystemExit):
            run_forked([failing(SystemExit(5))], 1, ignore)  # type: ignore[arg-type]
    finally:
        os.write(writing, b"once.")
    assert os.read(reading, 100) == b"once."
    os.close(reading)
    os.close(writing)


def test_a_process_whose_parent_dies_before_it_knows_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parent is killed after a process is begun, and before Linux would tell it."""
    reading, writing = os.pipe()

    def end_late() -> None:
        os.write(writing, b".")
        while os.getppid() == parent:
            time.sleep(0.01)
        end_with_parent()

    monkeypatch.setattr("mpt_trt.system.process_pool.end_with_parent", end_late)
    if (parent := os.fork()) == 0:
        parent = os.getpid()
        try:
            run_forked([wait_for_ever], 1, ignore)
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"."
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    ended, _, _ = select.select([reading], [], [], 60)
    assert ended and os.read(reading, 1) == b""  # nobody is left that could write
    os.close(reading)


def test_pytorch_computes_in_a_job_after_it_has_used_threads() -> None:
    def mean_root(_: Advance) -> float:
        return float(torch.sqrt(torch.full((1 << 20,), 4.0)).mean())

    used = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert mean_root(ignore) == 2
        assert run_forked([mean_root] * 3, 2, ignore) == [2] * 3
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(used)


def test_garbage_of_the_parent_stays_in_a_job() -> None:
    """An ONNX Runtime session in it would wait for threads that a fork does not copy."""
    ended = []

    class Session:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            ended.append(os.getpid())

    def collected(_: Advance) -> int:
        gc.collect()
        return len(ended)

    gc.collect()
    gc.disable()
    try:
        Session()
        assert run_forked([collected] * 2, 2, ignore) == [0, 0]
    finally:
        gc.enable()
    gc.collect()
    assert ended == [os.getpid()]
