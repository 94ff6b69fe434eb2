"""CUDA graphs of repeated steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

from cuda.bindings import runtime as cudart

from mpt_trt.engines.cuda.memory import call

# Runs after which runtimes have finished their set-up for new shapes.
PLAIN_RUNS = 2


class StepGraphs:
    """Captures a step when it is repeated after PLAIN_RUNS runs, and replays it from then on.

    Capturing earlier would be in vain for beam search, which moves the cache after most steps.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._plain_runs: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, Any] = {}

    def run(
        self, key: Hashable, enqueue: Callable[[], None], enqueue_captured: Callable[[], None]
    ) -> None:
        """Runs a step, or replays its graph.

        key: everything that decides which kernels run, and on which memory. enqueue: puts the step
        on the stream. enqueue_captured: does the same without anything that must not be captured,
        such as waiting for the stream.
        """
        if self._plain_runs[key] < PLAIN_RUNS:
            self._plain_runs[key] += 1
            enqueue()
            return
        if key not in self._graphs:
            self._graphs[key] = self._capture(enqueue_captured)
        call(cudart.cudaGraphLaunch(self._graphs[key], self._stream))

    def _capture(self, enqueue: Callable[[], None]) -> Any:
        # Runtimes may still allocate memory, which other modes forbid.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        call(cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            enqueue()
        except BaseException:
            # The error is more helpful than one about the capture that it ends.
            cudart.cudaStreamEndCapture(self._stream)
            raise
        return call(cudart.cudaGraphInstantiate(call(cudart.cudaStreamEndCapture(self._stream)), 0))
