"""A TensorRT plan on a GPU, and execution contexts for its steps."""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpt_trt.engines.cuda.memory import DeviceBuffer, Stream
from mpt_trt.engines.cuda.nccl import Nccl
from mpt_trt.engines.tensorrt.logger import make_logger
from mpt_trt.engines.tensorrt.token_choice import CHOSEN
from mpt_trt.errors import MptTrtError

Shapes = Mapping[str, tuple[int, ...]]


class LoadedPlan:
    """A plan on the GPU, with the scratch memory that all of its contexts share."""

    def __init__(self, path: Path, package: str, stream: Stream):
        """Loads the plan; raises MptTrtError with TensorRT's messages if that fails."""
        self._trt = importlib.import_module(package)
        self._stream = stream
        self._logger = make_logger(self._trt)
        self._runtime = self._trt.Runtime(self._logger)
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise MptTrtError(
                f"{path}: {self.description} cannot load the plan on this GPU: "
                f"{self._logger.take()}; build it again here"
            )
        names = map(self._engine.get_tensor_name, range(self._engine.num_io_tensors))
        if CHOSEN not in names:
            raise MptTrtError(
                f"{path}: the plan does not choose tokens, so an earlier version of mpt-trt built "
                "it; build the engine again"
            )
        self._scratch = DeviceBuffer(max(1, self._engine.device_memory_size_v2))

    @property
    def description(self) -> str:
        """Package and version, for reports."""
        return f"{self._trt.__name__} {self._trt.__version__}"

    def create_context(self, profile: int, nccl: Nccl | None) -> StepContext:
        """Creates a context for one of the plan's profiles.

        nccl: connects the ranks; all ranks call together. Raises MptTrtError when that fails.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        self.require(context is not None, "create an execution context")
        context.set_device_memory(self._scratch.address, self._scratch.size)
        stream = self._stream.handle
        is_set = context.set_optimization_profile_async(profile, stream)
        self.require(is_set, f"select profile {profile}")
        step_context = StepContext(self, context)
        if nccl is not None:
            step_context.connect(nccl)
        return step_context

    def require(self, is_done: bool, action: str) -> None:
        """Raises MptTrtError with TensorRT's messages unless `is_done`."""
        if not is_done:
            raise MptTrtError(f"{self.description} failed to {action}: {self._logger.take()}")


class StepContext:
    """An execution context; remembers what is set on it.

    A CUDA graph is valid only while the context that it was captured from is not changed, so
    changes are reported.
    """

    def __init__(self, plan: LoadedPlan, context: Any):
        self._plan, self._context = plan, context
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def connect(self, nccl: Nccl) -> None:
        """Lets the collective layers use NCCL; all ranks call together."""
        is_set = self._context.set_communicator(nccl.capsule)
        self._plan.require(is_set, "use the NCCL communicator")

    def set(self, addresses: Mapping[str, int], shapes: Shapes) -> bool:
        """Sets what has changed since the last call; returns whether anything has."""
        moved = {n: a for n, a in addresses.items() if self._addresses.get(n) != a}
        reshaped = {n: s for n, s in shapes.items() if self._shapes.get(n) != s}
        for name, address in moved.items():
            is_set = self._context.set_tensor_address(name, address)
            self._plan.require(is_set, f"set the address of {name}")
        for name, shape in reshaped.items():
            is_set = self._context.set_input_shape(name, shape)
            self._plan.require(is_set, f"set the shape {shape} of {name}")
        self._addresses |= moved
        self._shapes |= reshaped
        return bool(moved or reshaped)

    def is_capturable(self, stream: Any) -> bool:
        """Returns whether a step on the stream can be captured; older versions do not tell."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return True if ask is None else ask(stream)

    def enqueue(self, stream: Any) -> None:
        """Puts a step on the stream; raises MptTrtError with TensorRT's messages if it fails."""
        self._plan.require(self._context.execute_async_v3(stream), "run a step")
