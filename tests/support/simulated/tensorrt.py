"""The runtime half of TensorRT's Python API: plans, execution contexts and steps.

The signatures are those of the bindings (tests/engines/tensorrt/test_contract.py); enums and
loggers are the real ones. A step computes the rank's network (see support.simulated.network).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import tensorrt_rtx as real
from onnx import TensorProto

from support.simulated.capsule import capsule_pointer
from support.simulated.cuda import Operation, SimulatedCuda
from support.simulated.memory import ALIGNMENT, view
from support.simulated.network import RankNetwork, Shape, Tensor, profile_range
from support.simulated.rules import Book, Rule

SCRATCH_BYTES = 1536
# Content that a step leaves in its scratch memory.
SCRIBBLE = 0xA5
PROFILES = 2
DATA_TYPES = {
    TensorProto.INT64: real.DataType.INT64,
    TensorProto.FLOAT: real.DataType.FLOAT,
    TensorProto.FLOAT16: real.DataType.HALF,
    TensorProto.BFLOAT16: real.DataType.BF16,
    TensorProto.INT8: real.DataType.INT8,
    TensorProto.FLOAT8E4M3FN: real.DataType.FP8,
}


@dataclass
class World:
    """State that the simulated parts share.

    open_plan: finds the network that a plan was built from; raises ValueError for bytes that are no
    plan for this GPU. communicators: of the ranks, by the pointer that NCCL gives out. failing:
    names of methods that fail when they are called next. contexts, created: those that there are,
    and that there have been.
    """

    book: Book
    cuda: SimulatedCuda
    open_plan: Callable[[bytes], RankNetwork]
    communicators: dict[int, Any] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)
    contexts: int = 0
    created: int = 0

    def fails(self, name: str) -> bool:
        is_failing = name in self.failing
        self.failing.discard(name)
        return is_failing


class SimulatedTensorRt:
    """Stands in for the module `tensorrt_rtx` or `tensorrt`."""

    ILogger = real.ILogger
    Logger = real.Logger
    ExecutionContextAllocationStrategy = real.ExecutionContextAllocationStrategy
    DataType = real.DataType
    TensorIOMode = real.TensorIOMode
    TensorLocation = real.TensorLocation
    Dims = real.Dims

    def __init__(self, world: World, name: str = "tensorrt_rtx"):
        self.__name__, self.__version__ = name, real.__version__
        self.Runtime = partial(Runtime, world)


class Runtime:
    def __init__(self, world: World, logger: Any):
        self.logger, self._world = logger, world

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        try:
            network = self._world.open_plan(bytes(serialized_engine))
        except ValueError as error:
            self.logger.log(real.ILogger.Severity.ERROR, str(error))
            return None
        return ICudaEngine(self, network, self._world)


class ICudaEngine:
    def __init__(self, runtime: Runtime, network: RankNetwork, world: World):
        self._runtime, self._network, self._world = runtime, network, world
        self._tensors = network.inputs | network.outputs

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return PROFILES

    @property
    def device_memory_size_v2(self) -> int:
        return SCRATCH_BYTES

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        is_input = name in self._network.inputs
        return real.TensorIOMode.INPUT if is_input else real.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return DATA_TYPES[self._tensors[name].element_type]

    def get_tensor_location(self, name: str) -> Any:
        return real.TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> Any:
        dims = self._tensors[name].dims
        return real.Dims([dim if isinstance(dim, int) else -1 for dim in dims])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list:
        tensor = self._network.inputs[name]
        low, high = profile_range(tensor, self._network.spec.limits, profile_index)
        return [real.Dims(low), real.Dims([1, *high[1:]]), real.Dims(high)]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._network.aliases.get(name)

    def create_execution_context(
        self, strategy: Any = real.ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext | None:
        if self._world.fails("create_execution_context"):
            self._runtime.logger.log(real.ILogger.Severity.ERROR, "out of memory (simulated)")
            return None
        is_managed = strategy == real.ExecutionContextAllocationStrategy.USER_MANAGED
        self._world.book.require(is_managed, Rule.SCRATCH_SET, str(strategy))
        return IExecutionContext(self, self._network, self._world)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, network: RankNetwork, world: World):
        self.engine, self._network, self._world = engine, network, world
        self._book, self._cuda = world.book, world.cuda
        self._scratch = (0, 0)
        self._profile, self._profile_stream = 0, None
        self._profile_is_set = True
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {}
        self._has_run = False
        self._version = 0
        self._communicator: int | None = None
        world.contexts += 1
        world.created += 1

    def __del__(self) -> None:
        self._world.contexts -= 1
        # Graphs that were captured from it must not be launched any more.
        self._version = -1

    # --- settings ---

    def set_device_memory(self, memory: int, size: int) -> None:
        self._book.require(memory % ALIGNMENT == 0, Rule.SCRATCH_ALIGNED, hex(memory))
        needed = self.engine.device_memory_size_v2
        self._book.require(size >= needed, Rule.SCRATCH_LARGE_ENOUGH, f"{size} < {needed} bytes")
        self._cuda.memory.require_live(memory, needed, "scratch memory")
        self._scratch = (memory, needed)
        self._change()

    def set_optimization_profile_async(self, profile_index: int, stream_handle: Any) -> bool:
        self._book.require(0 <= profile_index < PROFILES, Rule.PROFILE_VALID, str(profile_index))
        self._profile, self._profile_stream = profile_index, stream_handle
        self._profile_is_set = False
        # Changing the profile invalidates the shapes.
        self._shapes.clear()
        self._change()

        def use_profile() -> None:
            self._profile_is_set = True

        self._cuda.put(stream_handle, Operation("set profile", use_profile))
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._require_tensor(name, self.engine._tensors)
        self._book.require(memory % ALIGNMENT == 0, Rule.ADDRESS_ALIGNED, f"{name} at {memory:#x}")
        self._cuda.memory.require_live(memory, 1, name)
        if self._addresses.get(name) != memory:
            self._addresses[name] = memory
            self._change()
        return True

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        self._require_tensor(name, self._network.inputs)
        limits = self._network.spec.limits
        low, high = profile_range(self._network.inputs[name], limits, self._profile)
        fits = len(shape) == len(low) and all(
            least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
        )
        self._book.require(fits, Rule.SHAPE_IN_PROFILE, f"{name} {tuple(shape)}: {low} to {high}")
        if self._shapes.get(name) != tuple(shape):
            self._shapes[name] = tuple(shape)
            self._has_run = False
            self._change()
        return True

    def set_communicator(self, communicator: Any) -> bool:
        pointer = capsule_pointer(communicator)
        self._book.require(
            pointer in self._world.communicators, Rule.COMMUNICATOR_SET, hex(pointer)
        )
        self._communicator = pointer
        # It blocks until every rank has called it.
        self._world.communicators[pointer].exchange(None)
        self._change()
        return not self._world.fails("set_communicator")

    def get_tensor_shape(self, name: str) -> Any:
        if name in self._network.inputs:
            return real.Dims(self._shapes.get(name, (-1,)))
        return real.Dims(self._network.output_shape(name, self._network.resolve(self._shapes)))

    def infer_shapes(self) -> list[str]:
        return [name for name in self._network.inputs if name not in self._shapes]

    def is_stream_capturable(self, stream: Any) -> bool:
        return True

    # --- a step ---

    def execute_async_v3(self, stream_handle: Any) -> bool:
        if self._world.fails("execute_async_v3"):
            logger = self.engine._runtime.logger
            logger.log(real.ILogger.Severity.ERROR, "a kernel failed (simulated)")
            return False
        self._require_ready(stream_handle)
        is_captured = self._cuda.is_capturing(stream_handle)
        if is_captured:
            self._book.require(self._has_run, Rule.CAPTURE_AFTER_PLAIN_RUN, str(self._shapes))
        self._has_run = True
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        scratch, version = self._scratch, self._version

        def require_unchanged() -> None:
            self._book.require(
                self._version == version, Rule.GRAPH_MATCHES_CONTEXT, "launch of a graph"
            )

        def compute() -> None:
            self._require_memory(addresses, shapes, scratch)
            view(*scratch)[:] = SCRIBBLE
            communicator = self._world.communicators.get(self._communicator or 0)
            self._network.run(addresses, shapes, communicator)

        self._cuda.put(
            stream_handle, Operation("step", compute, before_launch=require_unchanged, context=self)
        )
        return True

    def _require_ready(self, stream: Any) -> None:
        """Checks everything that must be true when a step is enqueued."""
        network, require = self._network, self._book.require
        require(int(stream) != 0, Rule.NONDEFAULT_STREAM, "the default stream")
        for name in (*network.inputs, *network.outputs):
            require(name in self._addresses, Rule.ADDRESS_SET, name)
        require(not self.infer_shapes(), Rule.SHAPE_SET, ", ".join(self.infer_shapes()))
        try:
            network.resolve(self._shapes)
        except ValueError as error:
            raise self._book.broken(Rule.SHAPES_CONSISTENT, str(error)) from None
        for output, source in network.aliases.items():
            is_shared = self._addresses[output] == self._addresses[source]
            require(is_shared, Rule.CACHE_ALIASED, f"{output} and {source}")
        require(self._scratch[1] > 0, Rule.SCRATCH_SET, "no scratch memory")
        is_same = self._profile_stream is not None and int(self._profile_stream) == int(stream)
        is_ordered = self._profile_is_set or is_same
        require(is_ordered, Rule.PROFILE_SYNCHRONIZED, "another stream")
        if network.has_collectives:
            is_alive = self._communicator in self._world.communicators
            require(is_alive, Rule.COMMUNICATOR_SET, network.path.name)
        self._require_alone(stream)
        self._require_memory(self._addresses, self._shapes, self._scratch)
        self._require_apart()

    def _require_alone(self, stream: Any) -> None:
        for operation in self._cuda.pending(stream):
            other = operation.context
            if other is None or other is self or other.engine is not self.engine:
                continue
            shares = other._scratch[0] == self._scratch[0]
            self._book.require(not shares, Rule.SCRATCH_EXCLUSIVE, operation.name)
            is_same = other._profile == self._profile
            self._book.require(not is_same, Rule.PROFILE_EXCLUSIVE, operation.name)

    def _require_memory(
        self, addresses: dict[str, int], shapes: dict[str, Shape], scratch: tuple[int, int]
    ) -> None:
        memory = self._cuda.memory
        memory.require_live(*scratch, "scratch memory")
        for name, (address, size) in self._ranges(addresses, shapes).items():
            memory.require_live(address, 1, name)
            is_held = memory.find(address, size) is not None
            self._book.require(is_held, Rule.BUFFER_LARGE_ENOUGH, f"{name}: {size} bytes")

    def _require_apart(self) -> None:
        ranges = self._ranges(self._addresses, self._shapes)
        aliases = self._network.aliases
        for output in self._network.outputs:
            start, size = ranges[output]
            for name, (other, other_size) in ranges.items():
                if name in (output, aliases.get(output)):
                    continue
                is_apart = start + size <= other or other + other_size <= start
                self._book.require(is_apart, Rule.OUTPUTS_APART, f"{output} and {name}")

    def _ranges(
        self, addresses: dict[str, int], shapes: dict[str, Shape]
    ) -> dict[str, tuple[int, int]]:
        """First address and bytes of every tensor."""
        network = self._network
        sizes = network.resolve(shapes)
        outputs = {name: network.output_shape(name, sizes) for name in network.outputs}
        tensors = self.engine._tensors
        return {
            name: (addresses[name], tensors[name].size(shape))
            for name, shape in (shapes | outputs).items()
        }

    def _require_tensor(self, name: str, known: dict[str, Tensor]) -> None:
        self._book.require(name in known, Rule.KNOWN_TENSOR, name)

    def _change(self) -> None:
        self._version += 1
