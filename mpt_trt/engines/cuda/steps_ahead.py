"""Steps that choose their tokens on the GPU, and run while the host looks at the last result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from mpt_trt.engines.cuda.memory import Event, PinnedBuffer, call

INT64_BYTES = 8
FLOAT32_BYTES = 4


def run_ahead(
    run_step: Callable[[int], None],
    read_result: Callable[[NDArray[np.uint8], Any], None],
    rows: int,
    sums_start: int,
    count: int,
    stream: Any,
    limit: Callable[[], AbstractContextManager[None]],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Runs up to `count` steps, each before the caller has the result of the one before.

    Args:
        run_step: puts the step with this number on the stream.
        read_result: copies the step's result to an array in pinned memory: bytes that begin with
            the chosen token of each row, int64 `[rows]`.
        rows: number of rows.
        sums_start: first byte of the sums of exp(logit - largest logit), float32 `[rows]`, in the
            result, which they end.
        count: number of steps.
        stream: stream of all work.
        limit: encloses calls that may wait for other ranks.

    Yields:
        Tokens and their log-probabilities; see `GreedyModel.greedy_steps`.
    """
    results = [StepResult(rows, sums_start), StepResult(rows, sums_start)]
    try:
        for index in range(count + 1):
            with limit():
                if index < count:
                    run_step(index)
                    results[index % 2].fetch(read_result, stream)
                chosen = results[(index - 1) % 2].wait() if index else None
            if chosen is not None:
                yield chosen
    finally:
        # A step still writes to its result if the caller does not wait for it.
        with limit():
            call(cudart.cudaStreamSynchronize(stream))


class StepResult:
    """Tokens that a step has chosen, while they are copied to the host.

    rows, sums_start: see `run_ahead`.
    """

    def __init__(self, rows: int, sums_start: int):
        self._buffer = PinnedBuffer(sums_start + rows * FLOAT32_BYTES)
        self._tokens = self._buffer.array[: rows * INT64_BYTES].view(np.int64)
        self._sum_exp_relative_to_max = self._buffer.array[sums_start:].view(np.float32)
        self._event = Event()

    def fetch(self, read_result: Callable[[NDArray[np.uint8], Any], None], stream: Any) -> None:
        read_result(self._buffer.array, stream)
        self._event.record(stream)

    def wait(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Waits for the tokens and returns copies of them and of their log-probabilities."""
        self._event.synchronize()
        return self._tokens.copy(), -np.log(self._sum_exp_relative_to_max)
