"""Runs a rank's TensorRT plan on a GPU that it was built for.

One execution context per optimization profile, both on one scratch buffer. The KV cache is one
buffer per layer and kind, bound as input and as output, so TensorRT updates it in place. A step of
one token a row is captured in a CUDA graph when its shapes come a second time.

Written to the documented API of TensorRT 11 and TensorRT-RTX 1.7; see docs/engines.md for what has
been run.
"""

from __future__ import annotations

import importlib
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from mpt_trt.engines.manifest import Manifest
from mpt_trt.engines.nccl import join_nccl, set_communicator
from mpt_trt.engines.tensorrt import CONTEXT_PROFILE, GENERATION_PROFILE
from mpt_trt.errors import MptTrtError
from mpt_trt.numerics import STORAGE_TYPES
from mpt_trt.ranks import Communicator

INT64_BYTES = 8
FLOAT32_BYTES = 4


class TensorRtEngine:
    """One rank's plan, loaded; see `mpt_trt.generation.StepModel` for the contract."""

    def __init__(self, engine_dir: Path, manifest: Manifest, rank: int = 0):
        self._limits = limits = manifest.limits
        self.vocab_size = manifest.config.vocab_size
        self.capacity = limits.cache_len
        self.max_batch_size = limits.max_batch_size
        self.max_step_tokens = limits.max_input_len
        self.max_logits: int | None = limits.max_logits
        self._trt = importlib.import_module(manifest.builder.package)
        if manifest.tp_size > 1:
            # Ranks of one machine take its GPUs in turn.
            _call(cudart.cudaSetDevice(rank % _call(cudart.cudaGetDeviceCount())))
        self._stream = _call(cudart.cudaStreamCreate())
        self._engine = self._deserialize(engine_dir / manifest.ranks[rank].engine)
        self._contexts = self._create_contexts()
        self._element_bytes = STORAGE_TYPES[manifest.dtype].itemsize
        self._cache_shapes = self._find_cache()
        self._buffers = {
            "input_ids": DeviceBuffer(limits.max_batch_size * limits.max_input_len * INT64_BYTES),
            "write_positions": DeviceBuffer(limits.max_batch_size * INT64_BYTES),
            "logit_positions": DeviceBuffer(limits.max_logits * 2 * INT64_BYTES),
            "logits": DeviceBuffer(limits.max_logits * self.vocab_size * FLOAT32_BYTES),
        }
        self._cache: dict[str, DeviceBuffer] = {}
        self._batch_size = 0
        self._graphs: dict[tuple[int, int], Any] = {}

    def join(self, communicator: Communicator) -> None:
        """Connects the engine to those of the other ranks, which must all be loaded."""
        self._nccl = join_nccl(communicator)
        for context in self._contexts:
            set_communicator(context, self._nccl)

    @property
    def description(self) -> str:
        return f"{self._trt.__name__} {self._trt.__version__}"

    def start(self, batch_size: int) -> None:
        """An empty cache of `batch_size` rows; raises MptTrtError when the rows do not fit."""
        self._limits.require_rows(batch_size)
        self._use_cache(self._new_cache(batch_size), batch_size)

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_positions: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """One step; see the network's docstring. Returns `[num_logits, vocab]`."""
        num_logits = len(logit_positions)
        feeds = {
            "input_ids": input_ids,
            "write_positions": write_positions,
            # The profiles start at one row of logits; of no rows, one is computed and dropped.
            "logit_positions": logit_positions if num_logits else [[0, 0]],
        }
        staged = {name: np.ascontiguousarray(value, np.int64) for name, value in feeds.items()}
        for name, value in staged.items():
            self._buffers[name].copy_from(value, self._stream)
        if input_ids.shape[1] == 1:
            self._run_captured(staged)
        else:
            self._enqueue(CONTEXT_PROFILE, staged)
        logits = np.empty((num_logits, self.vocab_size), np.float32)
        self._buffers["logits"].copy_to(logits, self._stream)
        _call(cudart.cudaStreamSynchronize(self._stream))
        return logits

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Cache row i becomes a copy of old row rows[i]."""
        new = self._new_cache(len(rows))
        for name, buffer in new.items():
            row_bytes = self._row_bytes(name)
            for target, source in enumerate(rows):
                buffer.copy_part(
                    target * row_bytes,
                    self._cache[name],
                    int(source) * row_bytes,
                    row_bytes,
                    self._stream,
                )
        _call(cudart.cudaStreamSynchronize(self._stream))
        self._use_cache(new, len(rows))

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
        """A context per profile. They never run at the same time and share scratch memory."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        size = max(1, self._engine.device_memory_size_v2)
        self._scratch = DeviceBuffer(size)
        contexts = []
        for profile in (CONTEXT_PROFILE, GENERATION_PROFILE):
            context = self._engine.create_execution_context(strategy)
            context.set_device_memory(self._scratch.address, size)
            context.set_optimization_profile_async(profile, self._stream)
            contexts.append(context)
        _call(cudart.cudaStreamSynchronize(self._stream))
        return contexts

    def _find_cache(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each cache input, `[kv_heads, cache_len, head_dim]`."""
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        return {
            name: tuple(self._engine.get_tensor_shape(name))[1:]
            for name in names
            if name.startswith("past_")
        }

    def _row_bytes(self, name: str) -> int:
        return int(np.prod(self._cache_shapes[name])) * self._element_bytes

    def _new_cache(self, batch_size: int) -> dict[str, DeviceBuffer]:
        return {
            name: DeviceBuffer(batch_size * self._row_bytes(name)) for name in self._cache_shapes
        }

    def _use_cache(self, cache: dict[str, DeviceBuffer], batch_size: int) -> None:
        self._cache, self._batch_size = cache, batch_size
        self._graphs.clear()
        for context in self._contexts:
            for name, buffer in (cache | self._buffers).items():
                context.set_tensor_address(name, buffer.address)
            for name, buffer in cache.items():
                present = name.replace("past_", "present_", 1)
                context.set_tensor_address(present, buffer.address)

    def _enqueue(self, profile: int, feeds: dict[str, NDArray[np.int64]]) -> None:
        context = self._contexts[profile]
        for name, value in feeds.items():
            context.set_input_shape(name, value.shape)
        for name, shape in self._cache_shapes.items():
            context.set_input_shape(name, (self._batch_size, *shape))
        if not context.execute_async_v3(self._stream):
            raise MptTrtError(f"{self.description} failed to run a step; see its messages above")

    def _run_captured(self, feeds: dict[str, NDArray[np.int64]]) -> None:
        """Runs a one-token step; from the second time on by replaying its CUDA graph.

        The first time must not be captured: TensorRT finishes its set-up for new shapes then.
        """
        key = (len(feeds["input_ids"]), len(feeds["logit_positions"]))
        if key not in self._graphs:
            self._enqueue(GENERATION_PROFILE, feeds)
            self._graphs[key] = None
            return
        if self._graphs[key] is None:
            mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            _call(cudart.cudaStreamBeginCapture(self._stream, mode))
            self._enqueue(GENERATION_PROFILE, feeds)
            graph = _call(cudart.cudaStreamEndCapture(self._stream))
            self._graphs[key] = _call(cudart.cudaGraphInstantiate(graph, 0))
        _call(cudart.cudaGraphLaunch(self._graphs[key], self._stream))


class DeviceBuffer:
    """GPU memory, zeroed, freed when no longer referred to. address: as an integer."""

    def __init__(self, size: int):
        self.size = size
        self.address = int(_call(cudart.cudaMalloc(size)))
        _call(cudart.cudaMemset(self.address, 0, size))

    def __del__(self) -> None:
        cudart.cudaFree(self.address)

    def copy_from(self, source: NDArray, stream: Any) -> None:
        """Copies a contiguous host array to the start of the buffer."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        _call(cudart.cudaMemcpyAsync(self.address, source.ctypes.data, source.nbytes, kind, stream))

    def copy_to(self, target: NDArray, stream: Any) -> None:
        """Fills a contiguous host array from the start of the buffer."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _call(cudart.cudaMemcpyAsync(target.ctypes.data, self.address, target.nbytes, kind, stream))

    def copy_part(
        self, offset: int, source: DeviceBuffer, source_offset: int, size: int, stream: Any
    ) -> None:
        """Copies `size` bytes from another buffer; offsets are in bytes."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        _call(
            cudart.cudaMemcpyAsync(
                self.address + offset, source.address + source_offset, size, kind, stream
            )
        )


def _call(result: tuple) -> Any:
    """The value that a CUDA call returned; raises MptTrtError with CUDA's message if it failed."""
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        text = cudart.cudaGetErrorString(status)[1].decode()
        raise MptTrtError(f"CUDA: {text}; free GPU memory or lower the engine's limits")
    return values[0] if values else None
