"""CUDA graphs of repeated steps."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from cuda.bindings import runtime as cudart

from mpt_trt.engines.cuda.memory import call

# Number of runs after which runtimes have finished their set-up for new shapes.
PLAIN_RUNS = 2
# Graphs that are kept, of a few MB each: under continuous batching, every number of rows comes back
# again and again.
MOST_GRAPHS = 64


class StepGraphs:
    """Captures a step after PLAIN_RUNS runs, and replays it from then on.

    Earlier captures would be useless in beam search, which first moves the cache to new buffers.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._plain_runs: Counter[Hashable] = Counter()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()

    def clear(self) -> None:
        """Forgets all graphs and runs, because what was captured has changed."""
        self._graphs.clear()
        self._plain_runs.clear()

    def run(
        self, key: Hashable, enqueue: Callable[[], None], enqueue_captured: Callable[[], None]
    ) -> None:
        """Runs a step, or replays its graph.

        key: identifies the kernels and the memory of the step. enqueue: puts the step on the
        stream. enqueue_captured: does the same without operations that must not be captured, such
        as waiting for the stream.
        """
        if self._plain_runs[key] < PLAIN_RUNS:
            self._plain_runs[key] += 1
            enqueue()
            return
        if key not in self._graphs:
            if len(self._graphs) == MOST_GRAPHS:
                oldest, _ = self._graphs.popitem(last=False)
                del self._plain_runs[oldest]
            self._graphs[key] = _Graph(self._stream, enqueue_captured)
        self._graphs.move_to_end(key)
        self._graphs[key].launch()


class _Graph:
    """A captured step, destroyed with the object; NCCL waits for graphs that are not."""

    def __init__(self, stream: Any, enqueue: Callable[[], None]):
        self._stream = stream
        self._executable: Any = None
        # Other modes forbid allocations, which runtimes may still make.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        call(cudart.cudaStreamBeginCapture(stream, mode))
        try:
            enqueue()
        except BaseException:
            # This error is more helpful than the error of the capture that it ends.
            _, unfinished = cudart.cudaStreamEndCapture(stream)
            if unfinished is not None:
                cudart.cudaGraphDestroy(unfinished)
            raise
        graph = call(cudart.cudaStreamEndCapture(stream))
        try:
            self._executable = call(cudart.cudaGraphInstantiate(graph, 0))
        finally:
            cudart.cudaGraphDestroy(graph)

    def __del__(self) -> None:
        if self._executable is not None:
            # CUDA defers this until a launch that is under way has ended.
            cudart.cudaGraphExecDestroy(self._executable)

    def launch(self) -> None:
        call(cudart.cudaGraphLaunch(self._executable, self._stream))
