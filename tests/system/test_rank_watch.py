"""The end of calls in which a rank waits in vain."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mpt_trt.errors import MptTrtError
from mpt_trt.system.rank_watch import RankWatch

PATIENCE_S = 0.2


class Call:
    """A call that waits until it is interrupted."""

    def __init__(self) -> None:
        self.is_interrupted = threading.Event()

    def wait(self) -> None:
        assert self.is_interrupted.wait(10)


@contextmanager
def watching(call: Call, fault: str | None = None) -> Iterator[RankWatch]:
    watch = RankWatch(PATIENCE_S, call.is_interrupted.set, lambda: fault)
    try:
        yield watch
    finally:
        watch.close()


def test_a_call_that_waits_too_long_is_interrupted() -> None:
    call = Call()
    with watching(call) as watch:
        message = r"^timed out after 0.2 s waiting for the other ranks"
        with pytest.raises(MptTrtError, match=message), watch.limit():
            call.wait()
        # Nothing can be computed any more.
        with pytest.raises(MptTrtError, match="timed out"), watch.limit():
            pytest.fail("entered")


def test_the_cause_is_reported_instead_of_its_consequence() -> None:
    call = Call()
    with watching(call) as watch, pytest.raises(MptTrtError, match="timed out"), watch.limit():
        call.wait()
        raise RuntimeError("the interrupted call failed")


def test_a_fault_of_the_connection_does_not_wait_for_patience() -> None:
    call = Call()
    started = time.monotonic()
    watch = RankWatch(60, call.is_interrupted.set, lambda: "the others are gone")
    with pytest.raises(MptTrtError, match=r"^the others are gone$"), watch.limit():
        call.wait()
    watch.close()
    assert time.monotonic() - started < 30


def test_calls_in_time_and_pauses_between_them_are_left_alone() -> None:
    call = Call()
    with watching(call) as watch:
        for _ in range(3):
            with watch.limit():
                time.sleep(PAUSE := PATIENCE_S / 4)
            time.sleep(PATIENCE_S + PAUSE)
        with pytest.raises(ZeroDivisionError), watch.limit():
            raise ZeroDivisionError
    assert not call.is_interrupted.is_set()


STUCK = """
import time
from mpt_trt.system import rank_watch
rank_watch.GRACE_SECONDS = 0.2
with rank_watch.RankWatch(0.2, lambda: None, lambda: None).limit():
    time.sleep(60)
"""


def test_a_call_that_cannot_be_interrupted_ends_the_process() -> None:
    found = subprocess.run(
        [sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=50
    )
    assert found.returncode == 1
    assert found.stderr.startswith("error: timed out after 0.2 s waiting for the other ranks: one")
    assert len(found.stderr.splitlines()) == 1
