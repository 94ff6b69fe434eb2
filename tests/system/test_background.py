"""Work in a second thread: its order, its delay, and its errors."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from mpt_trt.system.background import background


def fail() -> None:
    raise ValueError("in the thread")


def test_work_is_done_in_order_and_at_most_one_behind() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.01)
        done.append(number)

    with background() as thread:
        for number in range(5):
            thread.start(partial(work, number))
            assert len(done) >= number
    assert done == list(range(5))


def test_the_caller_goes_on_meanwhile() -> None:
    goes_on, was_set = threading.Event(), []
    with background() as thread:
        thread.start(lambda: was_set.append(goes_on.wait(10)))
        goes_on.set()
    assert was_set == [True]


def test_errors_are_raised_when_the_next_work_starts_and_when_the_block_is_left() -> None:
    with background() as thread:
        thread.start(fail)
        with pytest.raises(ValueError, match="in the thread"):
            thread.start(fail)
        thread.start(fail)
        with pytest.raises(ValueError, match="in the thread"):
            thread.wait()
    with pytest.raises(ValueError, match="in the thread"), background() as thread:
        thread.start(fail)


def test_an_error_of_the_block_comes_first_and_waits_for_the_work() -> None:
    done: list[bool] = []

    def slow() -> None:
        time.sleep(0.05)
        done.append(True)
        fail()

    with pytest.raises(KeyError), background() as thread:
        thread.start(slow)
        raise KeyError
    assert done == [True]
