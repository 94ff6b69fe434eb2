"""Runs a rank's TensorRT plan on a GPU that it was built for.

Each optimization profile has an execution context; both share one scratch buffer. A step of one
token per row is captured in a CUDA graph (see mpt_trt.engines.cuda.graphs).

The code follows the documented API of TensorRT 11 and TensorRT-RTX 1.7; docs/engines.md lists what
has been run.
"""

from __future__ import annotations

import importlib
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.engines.cuda.graphs import StepGraphs
from mpt_trt.engines.cuda.kv_cache import make_device_cache
from mpt_trt.engines.cuda.memory import DeviceBuffer, call
from mpt_trt.engines.manifest import Manifest
from mpt_trt.engines.tensorrt.nccl import join_nccl, set_communicator
from mpt_trt.engines.tensorrt.plan_builder import CONTEXT_PROFILE, GENERATION_PROFILE
from mpt_trt.errors import MptTrtError
from mpt_trt.model.sharding import Rank
from mpt_trt.network.kv_cache import cache_names, cache_shape
from mpt_trt.system.mpi import Communicator

INT64_BYTES = 8
FLOAT32_BYTES = 4


class TensorRtEngine:
    """One rank's plan, loaded; see `mpt_trt.engines.interface.StepModel` for the contract."""

    def __init__(self, engine_dir: Path, manifest: Manifest, rank: int = 0):
        spec = manifest.spec
        self._limits = limits = spec.limits
        self.vocab_size = spec.config.vocab_size
        self.capacity = limits.cache_len
        self.max_batch_size = limits.max_batch_size
        self.max_step_tokens = limits.max_input_len
        self.max_logits: int | None = limits.max_logits
        self._trt = importlib.import_module(manifest.builder.package)
        if spec.tp_size > 1:
            # The ranks of a machine take its GPUs in turn.
            call(cudart.cudaSetDevice(rank % call(cudart.cudaGetDeviceCount())))
        self._stream = call(cudart.cudaStreamCreate())
        self._engine = self._deserialize(engine_dir / manifest.ranks[rank].engine)
        self._contexts = self._create_contexts()
        shape = cache_shape(spec.config, Rank(rank, spec.tp_size), limits.cache_len)
        self._cache = make_device_cache(
            shape,
            spec.quantization.kv_cache,
            STORAGE_TYPES[spec.dtype].itemsize,
            self._set_address,
        )
        self._row_shape = (shape.num_kv_heads, shape.cache_len, shape.head_dim)
        self._cache_inputs = cache_names("past", shape.num_layers)
        self._buffers = {
            "input_ids": DeviceBuffer(limits.max_batch_size * limits.max_input_len * INT64_BYTES),
            "write_positions": DeviceBuffer(limits.max_batch_size * INT64_BYTES),
            "logit_positions": DeviceBuffer(limits.max_logits * 2 * INT64_BYTES),
            "logits": DeviceBuffer(limits.max_logits * self.vocab_size * FLOAT32_BYTES),
        }
        for name, buffer in self._buffers.items():
            self._set_address(name, buffer.address)
        self._batch_size = 0
        self._graphs = StepGraphs(self._stream)

    def join(self, communicator: Communicator) -> None:
        """Connects the engine to those of the other ranks, which must all be loaded."""
        self._nccl = join_nccl(communicator)
        for context in self._contexts:
            set_communicator(context, self._nccl)

    @property
    def description(self) -> str:
        return f"{self._trt.__name__} {self._trt.__version__}"

    def start(self, batch_size: int) -> None:
        """Empties the cache for `batch_size` rows; raises MptTrtError when they do not fit."""
        self._limits.require_rows(batch_size)
        self._cache.start(batch_size, self._stream)
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
            # The profiles start at one row of logits: without rows, one is computed and dropped.
            "logit_positions": logit_positions if num_logits else [[0, 0]],
        }
        staged = {name: np.ascontiguousarray(value, np.int64) for name, value in feeds.items()}
        for name, value in staged.items():
            self._buffers[name].copy_from(value, self._stream)
        self._cache.before_step(input_ids.shape[1])
        if input_ids.shape[1] == 1:
            key = (self._batch_size, len(staged["logit_positions"]), self._cache.address)

            def enqueue() -> None:
                self._enqueue(GENERATION_PROFILE, staged)

            self._graphs.run(key, enqueue, enqueue)
        else:
            self._enqueue(CONTEXT_PROFILE, staged)
        self._cache.after_step(write_positions, self._stream)
        logits = np.empty((num_logits, self.vocab_size), np.float32)
        self._buffers["logits"].copy_to(logits, self._stream)
        call(cudart.cudaStreamSynchronize(self._stream))
        return logits

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Makes cache row i a copy of the old row rows[i]."""
        self._cache.reorder(rows, self._stream)
        call(cudart.cudaStreamSynchronize(self._stream))
        self._batch_size = len(rows)

    def _deserialize(self, path: Path) -> Any:
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._logger)
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan,
        ):
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise MptTrtError(
                f"{path}: {self.description} cannot load the plan on this GPU; build it again here"
            )
        return engine

    def _create_contexts(self) -> list[Any]:
        """Creates a context per profile; they never run at the same time and share memory."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        size = max(1, self._engine.device_memory_size_v2)
        self._scratch = DeviceBuffer(size)
        contexts = []
        for profile in (CONTEXT_PROFILE, GENERATION_PROFILE):
            context = self._engine.create_execution_context(strategy)
            context.set_device_memory(self._scratch.address, size)
            context.set_optimization_profile_async(profile, self._stream)
            contexts.append(context)
        call(cudart.cudaStreamSynchronize(self._stream))
        return contexts

    def _set_address(self, name: str, address: int) -> None:
        for context in self._contexts:
            context.set_tensor_address(name, address)

    def _enqueue(self, profile: int, feeds: dict[str, NDArray[np.int64]]) -> None:
        context = self._contexts[profile]
        for name, value in feeds.items():
            context.set_input_shape(name, value.shape)
        for name in self._cache_inputs:
            context.set_input_shape(name, (self._batch_size, *self._row_shape))
        if not context.execute_async_v3(self._stream):
            raise MptTrtError(f"{self.description} failed to run a step; see its messages above")
