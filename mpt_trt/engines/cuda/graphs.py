"""CUDA graphs of steps that come again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

from cuda.bindings import runtime as cudart

from mpt_trt.engines.cuda.memory import call

# What runtimes set up for new shapes, they have set up after as many runs.
PLAIN_RUNS = 2


class StepGraphs:
    """Captures what is put on a stream when it has come PLAIN_RUNS times, and replays it from then.

    Not before: after beam search has moved the cache there may be no other time.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._plain_runs: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, Any] = {}

    def run(
        self, key: Hashable, enqueue: Callable[[], None], enqueue_captured: Callable[[], None]
    ) -> None:
        """key: all that decides which kernels run, and on which memory.

        enqueue_captured: does what enqueue does, and nothing that must not be captured, such as
        waiting for the stream.
        """
        if self._plain_runs[key] < PLAIN_RUNS:
            self._plain_runs[key] += 1
            enqueue()
            return
        if key not in self._graphs:
            self._graphs[key] = self._capture(enqueue_captured)
        call(cudart.cudaGraphLaunch(self._graphs[key], self._stream))

    def _capture(self, enqueue: Callable[[], None]) -> Any:
        # Runtimes may still allocate memory of their own, which other modes forbid.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        call(cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            enqueue()
        except BaseException:
            # What went wrong says more than that the capture is of no use then.
            cudart.cudaStreamEndCapture(self._stream)
            raise
        return call(cudart.cudaGraphInstantiate(call(cudart.cudaStreamEndCapture(self._stream)), 0))
