"""Runs a rank's TensorRT plan on a GPU that it was built for.

Prompts run in one execution context. Steps of one token per row are captured in CUDA graphs (see
mpt_trt.engines.cuda.graphs). A graph is valid only while the context that it was captured from is
not changed, so there is a context for each number of rows and of logits, up to MOST_CONTEXTS.
docs/engine_format.md describes plans and the protocol of a step; docs/engines.md lists tested
hardware.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.engines.cuda.graphs import StepGraphs
from mpt_trt.engines.cuda.kv_cache import make_device_cache
from mpt_trt.engines.cuda.memory import DeviceBuffer, PinnedLogits, Stream
from mpt_trt.engines.cuda.nccl import Nccl, join_nccl
from mpt_trt.engines.cuda.steps_ahead import (
    FLOAT32_BYTES,
    INT64_BYTES,
    StepResult,
    run_ahead,
)
from mpt_trt.engines.interface import no_work
from mpt_trt.engines.manifest import Manifest
from mpt_trt.engines.tensorrt.plan import LoadedPlan, StepContext
from mpt_trt.engines.tensorrt.plan_builder import CONTEXT_PROFILE, GENERATION_PROFILE
from mpt_trt.engines.tensorrt.token_choice import CHOSEN, SUMS
from mpt_trt.model.sharding import Rank
from mpt_trt.network.kv_cache import cache_names, cache_shape
from mpt_trt.system.mpi import Communicator

# Maximum number of contexts of single-token steps, each with its graph. Under continuous batching,
# every number of rows up to max_batch_size comes back again and again.
MOST_CONTEXTS = 64


class _Generation(NamedTuple):
    """A context for single-token steps with one number of rows and of logits, and its graph.

    Python drops the last field first, so the graph is freed before its context.
    """

    context: StepContext
    graphs: StepGraphs


class TensorRtEngine:
    """A rank's loaded plan; implements `RowModel`, `GreedyModel` and `ChoosingModel`."""

    def __init__(self, engine_dir: Path, manifest: Manifest, rank: int = 0):
        """Loads the plan; raises MptTrtError if the GPU cannot hold or run it."""
        spec = manifest.spec
        self._limits = limits = spec.limits
        self.vocab_size = spec.config.vocab_size
        self.capacity = limits.cache_len
        self.max_batch_size = limits.max_batch_size
        self.max_step_tokens = limits.max_input_len
        self.max_logits: int | None = limits.max_logits
        self._stream = Stream()
        self._nccl: Nccl | None = None
        plan = engine_dir / manifest.ranks[rank].engine
        self._plan = LoadedPlan(plan, manifest.builder.package, self._stream)
        shape = cache_shape(spec.config, Rank(rank, spec.tp_size), limits.cache_len)
        self._row_shape = (shape.num_kv_heads, shape.cache_len, shape.head_dim)
        self._cache_inputs = cache_names("past", shape.num_layers)
        self._addresses: dict[str, int] = {}
        self._cache = make_device_cache(
            shape,
            spec.quantization.kv_cache,
            STORAGE_TYPES[spec.dtype].itemsize,
            self._addresses.__setitem__,
        )
        self._buffers = {
            "input_ids": DeviceBuffer(limits.max_batch_size * limits.max_input_len * INT64_BYTES),
            "write_positions": DeviceBuffer(limits.max_batch_size * INT64_BYTES),
            "logit_positions": DeviceBuffer(limits.max_logits * 2 * INT64_BYTES),
            "logits": DeviceBuffer(limits.max_logits * self.vocab_size * FLOAT32_BYTES),
            CHOSEN: DeviceBuffer(limits.max_logits * INT64_BYTES),
            SUMS: DeviceBuffer(limits.max_logits * FLOAT32_BYTES),
        }
        self._addresses |= {name: buffer.address for name, buffer in self._buffers.items()}
        self._logits = PinnedLogits(limits.max_batch_size, self.vocab_size)
        self._result = cache(lambda rows: StepResult(rows, rows * INT64_BYTES))
        self._work: Callable[[], None] = no_work
        self._batch_size = 0
        self._prompts = self._plan.create_context(CONTEXT_PROFILE, None)
        self._generations: OrderedDict[tuple[int, int], _Generation] = OrderedDict()

    def __del__(self) -> None:
        # Python would drop them in the order of creation: a plan before its contexts, NCCL before
        # the graphs that use it.
        for name in reversed(list(self.__dict__)):
            del self.__dict__[name]

    def join(self, communicator: Communicator) -> None:
        """Connects the engine to those of the other ranks, which must all be loaded."""
        self._nccl = join_nccl(communicator)
        self._prompts.connect(self._nccl)

    @property
    def description(self) -> str:
        return self._plan.description

    def start(self, batch_size: int) -> None:
        """Empties the cache for `batch_size` rows; raises MptTrtError when they do not fit."""
        self._limits.require_rows(batch_size)
        self._cache.start(batch_size, self._stream.handle)
        self._batch_size = batch_size

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_positions: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Runs one step (see mpt_trt.network.decoder); returns logits `[num_logits, vocab]`."""
        num_logits = len(logit_positions)
        feeds = {
            "input_ids": input_ids,
            "write_positions": write_positions,
            # The profiles' minimum is one row of logits: if none is requested, one is computed and
            # dropped.
            "logit_positions": logit_positions if num_logits else [[0, 0]],
        }
        staged = {name: np.ascontiguousarray(value, np.int64) for name, value in feeds.items()}
        stream = self._stream.handle
        for name, value in staged.items():
            self._buffers[name].copy_from(value, stream)
        with self._limit():
            self._run(input_ids.shape[1], len(staged["logit_positions"]), write_positions)
            if input_ids.shape[1] == 1:
                logits = self._logits.fetch(self._buffers["logits"], num_logits, stream)
                self._work()
            else:
                # The copy waits for the GPU.
                self._work()
                logits = np.empty((num_logits, self.vocab_size), np.float32)
                self._buffers["logits"].copy_to(logits, stream)
            self._stream.synchronize()
        return logits

    def greedy_steps(
        self, tokens: NDArray[np.int64], write_positions: NDArray[np.int64], count: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Runs steps of one token per row, each with the most likely tokens of the previous step.

        The next step runs while the caller looks at the result of the last one. See
        `GreedyModel.greedy_steps`.
        """
        rows, buffers, stream = self._batch_size, self._buffers, self._stream.handle
        self._write_tokens(tokens)

        def run_step(index: int) -> None:
            if index:
                buffers["input_ids"].copy_from_device(buffers[CHOSEN], rows * INT64_BYTES, stream)
            self._run_chosen(write_positions + index)

        return run_ahead(
            run_step, self._read_result, rows, rows * INT64_BYTES, count, stream, self._limit
        )

    def most_likely(
        self, tokens: NDArray[np.int64], write_positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Runs a step that chooses tokens on the GPU; see `ChoosingModel.most_likely`."""
        with self._limit():
            self._write_tokens(tokens)
            self._run_chosen(write_positions)
            result = self._result(self._batch_size)
            result.fetch(self._read_result, self._stream.handle)
            self._work()
            return result.wait()

    def _write_tokens(self, tokens: NDArray[np.int64]) -> None:
        """Copies the input of a step of one token per row, which chooses a token of each."""
        rows, stream = self._batch_size, self._stream.handle
        first_of_each_row = np.stack([np.arange(rows), np.zeros(rows, np.int64)], axis=1)
        self._buffers["input_ids"].copy_from(np.ascontiguousarray(tokens, np.int64), stream)
        self._buffers["logit_positions"].copy_from(np.ascontiguousarray(first_of_each_row), stream)

    def _run_chosen(self, write_positions: NDArray[np.int64]) -> None:
        positions = np.ascontiguousarray(write_positions, np.int64)
        self._buffers["write_positions"].copy_from(positions, self._stream.handle)
        self._run(1, self._batch_size, positions)

    def _read_result(self, target: NDArray[np.uint8], stream: Any) -> None:
        """Copies tokens and sums of all rows to the host."""
        size = self._batch_size * INT64_BYTES
        self._buffers[CHOSEN].copy_to(target[:size], stream)
        self._buffers[SUMS].copy_to(target[size:], stream)

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Makes cache row i a copy of the old row `rows[i]`."""
        self._cache.reorder(rows, self._stream.handle)
        self._stream.synchronize()
        self._batch_size = len(rows)

    def select_rows(self, first: int, count: int) -> None:
        """Limits the following steps to some cache rows; see `RowModel.select_rows`."""
        self._cache.select_rows(first, count)
        self._batch_size = count

    def copy_row(self, source: int, target: int) -> None:
        """Makes cache row `target` a copy of row `source`."""
        self._cache.copy_row(source, target, self._stream.handle)

    def overlap(self, work: Callable[[], None]) -> None:
        """Lets every step call `work` while the GPU computes it; see `OverlappingModel`."""
        self._work = work

    def _limit(self) -> AbstractContextManager[None]:
        """Encloses calls that may wait for other ranks."""
        return nullcontext() if self._nccl is None else self._nccl.limit()

    def _run(self, seq: int, num_logits: int, write_positions: NDArray[np.int64]) -> None:
        """Puts a step on the stream, whose inputs are in the buffers, and stores its keys."""
        self._cache.before_step(seq)
        rows = self._batch_size
        shapes: dict[str, tuple[int, ...]] = {
            "input_ids": (rows, seq),
            "write_positions": (rows,),
            "logit_positions": (num_logits, 2),
        }
        shapes |= dict.fromkeys(self._cache_inputs, (rows, *self._row_shape))
        if seq == 1:
            self._run_single_tokens(shapes)
        else:
            self._run_prompts(shapes)
        self._cache.after_step(write_positions, self._stream.handle)

    def _run_prompts(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._prompts.set(self._addresses, shapes)
        self._prompts.enqueue(self._stream.handle)

    def _run_single_tokens(self, shapes: dict[str, tuple[int, ...]]) -> None:
        context, graphs = self._generation(shapes)
        if context.set(self._addresses, shapes):
            graphs.clear()
        stream = self._stream.handle

        def enqueue() -> None:
            context.enqueue(stream)

        if context.is_capturable(stream):
            # Not addresses, which may be the old ones again on some ranks only.
            graphs.run(self._cache.place, enqueue, enqueue)
        else:
            enqueue()

    def _generation(self, shapes: dict[str, tuple[int, ...]]) -> _Generation:
        """Returns a context for a single-token step, the last one or a new one."""
        key = (self._batch_size, shapes["logit_positions"][0])
        if key not in self._generations:
            if len(self._generations) == MOST_CONTEXTS:
                self._generations.popitem(last=False)
            context = self._plan.create_context(GENERATION_PROFILE, self._nccl)
            self._generations[key] = _Generation(context, StepGraphs(self._stream.handle))
        self._generations.move_to_end(key)
        return self._generations[key]
