"""TensorRT's runtime on a real GPU, where ONNX Runtime's CUDA provider computes the steps.

CUDA, its streams and its graphs are the real ones. So this runs the engine's own code on a GPU that
no plan is for. It works on the very addresses that are set, and puts steps on the stream that is
given, also while that is captured. first_contact.checked can be put around it.
"""

from __future__ import annotations

from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from cuda.bindings import runtime as cudart
from onnx import TensorProto

from mpt_trt.engines.cuda.memory import call
from mpt_trt.engines.onnxruntime.cuda.logit_rows import append_argmax
from mpt_trt.engines.onnxruntime.cuda.session import CudaSession
from mpt_trt.engines.onnxruntime.rewrites import spell_out_scale_types
from mpt_trt.engines.spec import EngineSpec
from mpt_trt.network.external_files import read_network
from mpt_trt.network.graph import ELEMENT_TYPES
from support.simulated.network import RankNetwork, Shape, profile_range

NAME, VERSION = "device", "0"
# As in support.simulated.install, which needs TensorRT.
PLAN_MARK = b"simulated plan of "
SCRATCH_BYTES = 1536
SINGLE_TOKEN_PROFILE = 1


class Strategy(IntEnum):
    """TensorRT's ExecutionContextAllocationStrategy."""

    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class Severity(IntEnum):
    """Severities of TensorRT's ILogger."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    """The base class of TensorRT's loggers."""

    Severity = Severity


class DeviceTensorRt:
    """Stands in for the module `tensorrt_rtx`. specs: of engines, by the folder of their plans."""

    ILogger = ILogger
    ExecutionContextAllocationStrategy = Strategy

    def __init__(self, specs: dict[Path, EngineSpec]):
        self.__name__, self.__version__ = NAME, VERSION
        self.Runtime = partial(Runtime, specs)


class Runtime:
    def __init__(self, specs: dict[Path, EngineSpec], logger: Any):
        self._specs = specs

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine:
        path = Path(bytes(serialized_engine).removeprefix(PLAN_MARK).decode())
        return Engine(RankNetwork(path, self._specs[path.parent]))


class Engine:
    num_optimization_profiles = 2
    device_memory_size_v2 = SCRATCH_BYTES

    def __init__(self, network: RankNetwork):
        self.network = network
        self.tensors = network.inputs | network.outputs
        self.sessions: dict[int, CudaSession] = {}

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]:
        tensor, limits = self.network.inputs[name], self.network.spec.limits
        low, high = profile_range(tensor, limits, profile_index)
        return [low, high, high]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.network.aliases.get(name)

    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy == Strategy.USER_MANAGED
        return Context(self)

    def session(self, profile: int, stream: Any) -> CudaSession:
        """The network of a profile. That of single tokens computes nothing on the host."""
        if profile not in self.sessions:
            model = read_network(self.network.path)
            spell_out_scale_types(model, ELEMENT_TYPES[self.network.spec.dtype])
            append_argmax(model)
            if profile == SINGLE_TOKEN_PROFILE:
                _fix_sequence_to_one(model)
            self.sessions[profile] = CudaSession(model, self.network.path, stream, {})
        return self.sessions[profile]


class Context:
    def __init__(self, engine: Engine):
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {}
        self._profile = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0 and size >= SCRATCH_BYTES

    def set_optimization_profile_async(self, profile_index: int, stream_handle: Any) -> bool:
        self._profile = profile_index
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory % 256 == 0

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        self._shapes[name] = tuple(shape)
        return True

    def is_stream_capturable(self, stream: Any) -> bool:
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.network.inputs if name not in self._shapes]

    def execute_async_v3(self, stream_handle: Any) -> bool:
        network, session = self._engine.network, self._engine.session(self._profile, stream_handle)
        sizes = network.resolve(self._shapes)
        for name, tensor in network.inputs.items():
            shape = self._shapes[name]
            session.bind_input(name, tensor.element_type, shape, self._addresses[name])
        for name, tensor in network.outputs.items():
            shape = network.output_shape(name, sizes)
            session.bind_output(name, tensor.element_type, shape, self._addresses[name])
        status = call(cudart.cudaStreamIsCapturing(stream_handle))
        if status == cudart.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone:
            session.run()
        else:
            session.enqueue()
        return True


def _fix_sequence_to_one(model: onnx.ModelProto) -> None:
    """Makes the shape of `input_ids` constant, so that ONNX Runtime folds what depends on it."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert model.graph.input[0].name == "input_ids"
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.INT64
    dims[1].ClearField("dim_param")
    dims[1].dim_value = 1
