"""Runs a rank's network under ONNX Runtime's CUDA provider.

Two sessions read one copy of the weights: one graph for prompts, and one for steps of one token per
row (see `rewrites`). After two such steps with the same cache, the next one is captured in a CUDA
graph. (ONNX Runtime's own CUDA graphs wait for the GPU after each run.) Weights, cache, inputs and
outputs are in this module's own buffers, and everything runs on one stream. Several ranks add and
join their tensors through NCCL, on the same stream (see `collectives`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray
from onnx import TensorProto

from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.engines.cuda.graphs import StepGraphs
from mpt_trt.engines.cuda.kv_cache import make_device_cache
from mpt_trt.engines.cuda.memory import DeviceBuffer, PinnedLogits, Stream, call
from mpt_trt.engines.cuda.nccl import Nccl, join_nccl
from mpt_trt.engines.cuda.steps_ahead import (
    FLOAT32_BYTES,
    INT64_BYTES,
    StepResult,
    run_ahead,
)
from mpt_trt.engines.interface import no_work
from mpt_trt.engines.manifest import Manifest
from mpt_trt.engines.onnxruntime.cuda import rewrites
from mpt_trt.engines.onnxruntime.cuda.collectives import CollectiveGroup, operator_library
from mpt_trt.engines.onnxruntime.cuda.session import PROVIDER, CudaSession
from mpt_trt.engines.onnxruntime.cuda.shared_weights import share_weights
from mpt_trt.engines.onnxruntime.cuda.uploaded_weights import LOADING_THREADS, UploadedWeights
from mpt_trt.engines.onnxruntime.described_network import require_described
from mpt_trt.engines.onnxruntime.external_data import SharedWeight
from mpt_trt.engines.onnxruntime.rewrites import spell_out_scale_types
from mpt_trt.engines.onnxruntime.session import naming_network
from mpt_trt.engines.spec import EngineSpec
from mpt_trt.model.sharding import Rank
from mpt_trt.network.external_files import read_network
from mpt_trt.network.graph import ELEMENT_TYPES
from mpt_trt.network.kv_cache import QUANTIZED_TYPES, CacheShape, cache_shape
from mpt_trt.system.mpi import Communicator

# Batch size from which an engine uses the prepacked layout, by bits of weights. The column layout
# decodes smaller batches and reads prompts faster (docs/appendix/experiments.md).
PREPACKED_ROWS = {4: 16, 8: 2}
# Data types and major compute capability with kernels for the prepacked layout.
PREPACKED_TYPES = ("float16", "bfloat16")
PREPACKED_COMPUTE_CAPABILITY = 8
# Bytes per row of a step's result: the token, its position, and a float32.
RESULT_BYTES = 2 * INT64_BYTES + FLOAT32_BYTES


class OnnxCudaEngine:
    """A rank's network that is loaded on a GPU; implements `GreedyModel` and `ChoosingModel`.

    All ranks make the same calls, and the last is the end of the object.
    """

    def __init__(self, engine_dir: Path, manifest: Manifest, rank: int = 0):
        """Loads the network; several ranks must then be connected with `join`."""
        spec = manifest.spec
        self._limits = limits = spec.limits
        self.vocab_size = spec.config.vocab_size
        self.capacity = limits.cache_len
        self.max_batch_size = limits.max_batch_size
        self.max_step_tokens = limits.max_input_len
        self.max_logits: int | None = None
        # Finds CUDA's libraries in Python packages if the system has none.
        onnxruntime.preload_dlls()
        self._stream = Stream()
        self._nccl: Nccl | None = None
        self._group: CollectiveGroup | None = None
        part = Rank(rank, spec.tp_size)
        self._load(engine_dir / manifest.ranks[rank].network, spec, part)
        shape = cache_shape(spec.config, part, limits.cache_len)
        self._binder = _CacheBinder((self._prompts, self._steps), shape, _cache_type(spec))
        element_bytes = STORAGE_TYPES[spec.dtype].itemsize
        self._cache = make_device_cache(
            shape, spec.quantization.kv_cache, element_bytes, self._binder.bind
        )
        self._rows = 0
        self._state = _StepState(limits.max_batch_size, self.vocab_size)
        self._logits = PinnedLogits(limits.max_batch_size, self.vocab_size)
        self._result = cache(lambda rows: StepResult(rows, _sums_start(rows)))
        self._work: Callable[[], None] = no_work
        self._prompt_buffers: dict[str, DeviceBuffer] = {}
        self._graphs = StepGraphs(self._stream.handle)

    def _load(self, path: Path, spec: EngineSpec, rank: Rank) -> None:
        network = read_network(path)
        require_described(network, spec, rank, path)
        library = None
        with naming_network(path):
            spell_out_scale_types(network, ELEMENT_TYPES[spec.dtype])
            if rank.tp_size > 1:
                self._group, library = CollectiveGroup(rank.tp_size), operator_library()
                self._group.replace_collectives(network)
            element_type = ELEMENT_TYPES[spec.dtype]
            weights = share_weights(network, path.parent, _prepacked_bits(spec), element_type)
            prompts, steps = rewrites.prefill_graph(network), rewrites.decode_graph(network)
        with ThreadPoolExecutor(LOADING_THREADS) as pool:
            values = pool.map(SharedWeight.as_value, weights.constants)
            constants = dict(zip((each.name for each in weights.constants), values, strict=True))
        self._prompts = CudaSession(prompts, path, self._stream.handle, constants, library)
        self._steps = CudaSession(steps, path, self._stream.handle, constants, library)
        self._weights = UploadedWeights(weights.inputs, self._stream.handle)
        for weight in weights.inputs:
            address = self._weights.addresses[weight.name]
            for session in (self._prompts, self._steps):
                session.bind_input(weight.name, weight.element_type, weight.shape, address)

    def __del__(self) -> None:
        # Python would drop them in the order of creation, NCCL before the graphs that use it.
        for name in reversed(list(self.__dict__)):
            del self.__dict__[name]

    def join(self, communicator: Communicator) -> None:
        """Connects the engine to those of the other ranks, which must all be loaded."""
        self.connect(join_nccl(communicator))

    def connect(self, nccl: Nccl) -> None:
        """Lets the network's collectives use this communicator."""
        if self._group is None:
            raise RuntimeError("an engine of one rank has nothing to connect")
        self._nccl = nccl
        self._group.connect(nccl.pointer, nccl.library)

    @property
    def description(self) -> str:
        """Runtime, version and provider, for reports."""
        return f"ONNX Runtime {onnxruntime.__version__} ({PROVIDER})"

    def start(self, batch_size: int) -> None:
        """Empties the cache; raises MptTrtError when it has fewer than `batch_size` rows."""
        self._limits.require_rows(batch_size)
        self._use_rows(batch_size)
        self._cache.start(batch_size, self._stream.handle)

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_positions: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Runs one step; see `StepModel.step`."""
        with self._limit():
            if input_ids.shape[1] > 1:
                return self._read_prompts(input_ids, write_positions, logit_positions)
            self._state.write(input_ids[:, 0], write_positions, self._stream.handle)
            self._step_one(write_positions)
            # The step returns the logits of every row.
            logits = self._logits.fetch(self._state.logits, self._rows, self._stream.handle)
            self._work()
            self._stream.synchronize()
            wanted = logit_positions[:, 0]
            return logits if np.array_equal(wanted, np.arange(self._rows)) else logits[wanted]

    def most_likely(
        self, tokens: NDArray[np.int64], write_positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Runs a step that chooses tokens on the GPU; see `ChoosingModel.most_likely`."""
        with self._limit():
            self._state.write(tokens, write_positions, self._stream.handle)
            self._step_one(write_positions)
            result = self._result(self._rows)
            result.fetch(self._state.read_result, self._stream.handle)
            self._work()
            return result.wait()

    def greedy_steps(
        self, tokens: NDArray[np.int64], write_positions: NDArray[np.int64], count: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Runs steps of one token per row, each with the most likely tokens of the previous step.

        The next step runs while the caller looks at the result of the last one. See
        `GreedyModel.greedy_steps`.
        """
        self._state.write(tokens, write_positions, self._stream.handle)
        return run_ahead(
            lambda index: self._step_one(write_positions + index),
            self._state.read_result,
            self._rows,
            _sums_start(self._rows),
            count,
            self._stream.handle,
            self._limit,
        )

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Makes cache row i a copy of the old row `rows[i]`."""
        self._use_rows(len(rows))
        self._cache.reorder(rows, self._stream.handle)
        self._stream.synchronize()

    def select_rows(self, first: int, count: int) -> None:
        """Limits the following steps to some cache rows; see `RowModel.select_rows`."""
        self._use_rows(count)
        self._cache.select_rows(first, count)

    def copy_row(self, source: int, target: int) -> None:
        """Makes cache row `target` a copy of row `source`."""
        self._cache.copy_row(source, target, self._stream.handle)

    def overlap(self, work: Callable[[], None]) -> None:
        """Lets every step call `work` while the GPU computes it; see `OverlappingModel`."""
        self._work = work

    def _limit(self) -> AbstractContextManager[None]:
        """Encloses calls that may wait for other ranks."""
        return nullcontext() if self._nccl is None else self._nccl.limit()

    def _use_rows(self, rows: int) -> None:
        if rows != self._rows:
            self._rows = self._binder.rows = rows
            self._state.bind(self._steps, rows)

    def _step_one(self, write_positions: NDArray[np.int64]) -> None:
        self._before_step(1)
        key = (self._rows, self._cache.place)
        self._graphs.run(key, self._run_step, self._enqueue_step)
        self._cache.after_step(write_positions, self._stream.handle)

    def _run_step(self) -> None:
        self._steps.run()
        self._state.advance(self._stream.handle)

    def _enqueue_step(self) -> None:
        self._steps.enqueue()
        self._state.advance(self._stream.handle)

    def _before_step(self, seq: int) -> None:
        self._binder.seq = seq
        self._cache.before_step(seq)

    def _read_prompts(
        self,
        input_ids: NDArray[np.int64],
        write_positions: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        num_logits = len(logit_positions)
        logit_rows = logit_positions @ [input_ids.shape[1], 1]
        feeds = {
            "input_ids": input_ids,
            "write_positions": write_positions,
            # If no logits are requested, those of one row are computed and dropped.
            "logit_rows": logit_rows if num_logits else [0],
        }
        staged = {name: np.ascontiguousarray(value, np.int64) for name, value in feeds.items()}
        for name, value in staged.items():
            buffer = self._prompt_buffer(name, value.nbytes)
            buffer.copy_from(value, self._stream.handle)
            self._prompts.bind_input(name, TensorProto.INT64, value.shape, buffer.address)
        if self._prompts.has_input("key_length"):
            key_length = int(write_positions.max()) + input_ids.shape[1]
            self._prompts.bind_host_input("key_length", np.array([key_length]))
        shape = (len(staged["logit_rows"]), self.vocab_size)
        output = self._prompt_buffer("logits", shape[0] * shape[1] * FLOAT32_BYTES)
        self._prompts.bind_output("logits", TensorProto.FLOAT, shape, output.address)
        self._before_step(input_ids.shape[1])
        # The run waits for the GPU.
        self._work()
        self._prompts.run()
        self._cache.after_step(write_positions, self._stream.handle)
        logits = np.empty((num_logits, self.vocab_size), np.float32)
        output.copy_to(logits, self._stream.handle)
        self._stream.synchronize()
        return logits

    def _prompt_buffer(self, name: str, size: int) -> DeviceBuffer:
        """Returns a buffer of at least `size` bytes; reuses the previous one of that name."""
        if name not in self._prompt_buffers or self._prompt_buffers[name].size < size:
            self._prompt_buffers.pop(name, None)
            self._prompt_buffers[name] = DeviceBuffer(size)
        return self._prompt_buffers[name]


class _CacheBinder:
    """Binds parts of the cache, or of a step's new keys and values, to the sessions.

    rows, seq: current number of rows, and of tokens per step.
    """

    def __init__(self, sessions: tuple[CudaSession, ...], shape: CacheShape, element_type: int):
        self._sessions, self._shape, self._element_type = sessions, shape, element_type
        self.rows = self.seq = 0

    def bind(self, name: str, address: int) -> None:
        age, _ = name.split("_", 1)
        shape = self._shape
        positions = self.seq if age == "new" else shape.cache_len
        dimensions = (self.rows, shape.num_kv_heads, positions, shape.head_dim)
        for session in self._sessions:
            bind = session.bind_input if age == "past" else session.bind_output
            bind(name, self._element_type, dimensions, address)


class _StepState:
    """Inputs and outputs of a step of one token per row, for up to `rows` rows.

    One buffer has a step's tokens and positions, and another has those of the next step, followed
    by their likelihood. So two steps need one copy between them and one to the host.
    """

    def __init__(self, rows: int, vocab_size: int):
        self._vocab_size = vocab_size
        self._present = DeviceBuffer(2 * rows * INT64_BYTES)
        self._next = DeviceBuffer(rows * RESULT_BYTES)
        self.logits = DeviceBuffer(rows * vocab_size * FLOAT32_BYTES)
        self._rows = rows

    def bind(self, session: CudaSession, rows: int) -> None:
        self._rows = rows
        integer, real, size = TensorProto.INT64, TensorProto.FLOAT, rows * INT64_BYTES
        present, following = self._present.address, self._next.address
        session.bind_input("input_ids", integer, (rows, 1), present)
        session.bind_input("write_positions", integer, (rows,), present + size)
        session.bind_output("next_ids", integer, (rows, 1), following)
        session.bind_output("next_positions", integer, (rows,), following + size)
        session.bind_output("sum_exp_relative_to_max", real, (rows, 1), following + 2 * size)
        session.bind_output("logits", real, (rows, self._vocab_size), self.logits.address)

    def write(
        self, tokens: NDArray[np.int64], write_positions: NDArray[np.int64], stream: Any
    ) -> None:
        self._present.copy_from(np.concatenate([tokens, write_positions]), stream)

    def advance(self, stream: Any) -> None:
        """Makes the next step's tokens and positions the current ones."""
        self._present.copy_from_device(self._next, 2 * self._rows * INT64_BYTES, stream)

    def read_result(self, target: NDArray[np.uint8], stream: Any) -> None:
        """Copies the result to the host. target: `[rows * RESULT_BYTES]`."""
        self._next.copy_to(target, stream)


def _sums_start(rows: int) -> int:
    """First byte of the sums in the result of a step."""
    return 2 * rows * INT64_BYTES


def _cache_type(spec: EngineSpec) -> int:
    """ONNX type of the cache."""
    kv_cache = spec.quantization.kv_cache
    return ELEMENT_TYPES[spec.dtype] if kv_cache == "auto" else QUANTIZED_TYPES[kv_cache][0]


def _prepacked_bits(spec: EngineSpec) -> tuple[int, ...]:
    """Bits of the integers to store in the prepacked layout."""
    attribute = cudart.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor
    major = call(cudart.cudaDeviceGetAttribute(attribute, 0))
    if spec.dtype not in PREPACKED_TYPES or major < PREPACKED_COMPUTE_CAPABILITY:
        return ()
    rows = spec.limits.max_batch_size
    return tuple(bits for bits, least in PREPACKED_ROWS.items() if rows >= least)
