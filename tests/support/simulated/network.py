"""Computes a rank's network under ONNX Runtime, on a CPU, in buffers given by their addresses."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpt_trt.engines.onnxruntime.collectives import Collectives
from mpt_trt.engines.onnxruntime.cpu_engine import _computing_type, _open_session
from mpt_trt.engines.onnxruntime.cpu_settings import CpuSettings
from mpt_trt.engines.spec import BuildLimits, EngineSpec
from mpt_trt.model.sharding import Rank
from mpt_trt.network.graph import COLLECTIVE, ELEMENT_TYPES
from support.simulated.memory import view

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """An input or output of the network. dims: sizes, or names of dynamic dimensions."""

    name: str
    element_type: int
    dims: tuple[int | str, ...]

    @property
    def itemsize(self) -> int:
        return helper.tensor_dtype_to_np_dtype(self.element_type).itemsize

    def size(self, shape: Shape) -> int:
        """Bytes of the tensor in this shape."""
        return math.prod(shape) * self.itemsize


# Outputs that the builder adds to the network.
CHOICE = (
    Tensor("next_ids", TensorProto.INT64, ("num_logits", 1)),
    Tensor("sum_exp_relative_to_max", TensorProto.FLOAT, ("num_logits", 1)),
)


class RankNetwork:
    """One rank's network: the inputs and outputs of its plan, and what a step computes."""

    def __init__(self, path: Path, spec: EngineSpec):
        self.path, self.spec = path, spec
        graph = onnx.load(path, load_external_data=False).graph
        self.inputs = {value.name: _tensor(value) for value in graph.input}
        self.network_outputs = {value.name: _tensor(value) for value in graph.output}
        self.outputs = self.network_outputs | {each.name: each for each in CHOICE}
        self.has_collectives = any(node.op_type == COLLECTIVE for node in graph.node)
        # TensorScatter becomes TensorRT's cache layer, which updates its input in place.
        self.aliases = {
            node.output[0]: node.input[0] for node in graph.node if node.op_type == "TensorScatter"
        }

    def resolve(self, shapes: dict[str, Shape]) -> dict[str, int]:
        """Sizes of the dynamic dimensions; raises ValueError when inputs contradict each other."""
        sizes: dict[str, int] = {}
        for name, tensor in self.inputs.items():
            for dim, size in zip(tensor.dims, shapes[name], strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise ValueError(f"{dim} = {sizes[dim]} and, in {name}, {size}")
        return sizes

    def output_shape(self, name: str, sizes: dict[str, int]) -> Shape:
        return tuple(d if isinstance(d, int) else sizes[d] for d in self.outputs[name].dims)

    def run(self, addresses: dict[str, int], shapes: dict[str, Shape], communicator: Any) -> None:
        """Computes a step. communicator: of the ranks, over MPI; None for one rank."""
        session, _ = self._session
        sizes = self.resolve(shapes)
        shapes = shapes | {name: self.output_shape(name, sizes) for name in self.outputs}
        binding, converted = session.io_binding(), []
        for name, tensor in (self.inputs | self.network_outputs).items():
            array = self._array(tensor, addresses[name], shapes[name])
            element_type = tensor.element_type
            if element_type == self._stored_type and name != "logits":
                element_type = self._computing_type
            if element_type != tensor.element_type:
                kept = converted_by_address(converted, addresses[name])
                stored, array = array, array.astype(np.float32) if kept is None else kept
                converted.append((addresses[name], stored, array))
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element_type)
            bind = binding.bind_ortvalue_input
            if name in self.outputs:
                bind = binding.bind_ortvalue_output
            bind(name, value)
        meeting = nullcontext() if communicator is None else Collectives(communicator).step()
        with meeting:
            session.run_with_iobinding(binding)
        for _, stored, array in converted:
            stored[...] = array.astype(stored.dtype)
        logits, *choice = (
            self._array(self.outputs[name], addresses[name], shapes[name])
            for name in ("logits", *(each.name for each in CHOICE))
        )
        choose(logits, *choice)

    @cached_property
    def _session(self) -> tuple[onnxruntime.InferenceSession, list]:
        rank = Rank(int(self.path.stem.removeprefix("rank")), self.spec.tp_size)
        return _open_session(self.path, CpuSettings(num_threads=1), self.spec, rank)

    @property
    def _stored_type(self) -> int:
        return ELEMENT_TYPES[self.spec.dtype]

    @property
    def _computing_type(self) -> int:
        return _computing_type(self.spec)

    def _array(self, tensor: Tensor, address: int, shape: Shape) -> NDArray[Any]:
        """The tensor's memory as an array; 8-bit floating point as bytes."""
        content = view(address, tensor.size(shape))
        if tensor.element_type == TensorProto.FLOAT8E4M3FN:
            return content.reshape(shape)
        return content.view(helper.tensor_dtype_to_np_dtype(tensor.element_type)).reshape(shape)


def choose(logits: NDArray, chosen: NDArray, sums: NDArray) -> None:
    """Computes what the builder adds to the network; the arrays of the results are filled."""
    chosen[...] = logits.argmax(axis=-1, keepdims=True)
    sums[...] = np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True)


def profile_range(tensor: Tensor, limits: BuildLimits, profile: int) -> tuple[Shape, Shape]:
    """Least and largest shape of an input; docs/engine_format.md has the table."""
    tokens = (limits.max_input_len, 1)[profile]
    logits = limits.max_batch_size * (tokens if limits.gather_all_token_logits else 1)
    largest = {"batch": limits.max_batch_size, "seq": tokens, "num_logits": logits}
    low = tuple(dim if isinstance(dim, int) else 1 for dim in tensor.dims)
    return low, tuple(dim if isinstance(dim, int) else largest[dim] for dim in tensor.dims)


def converted_by_address(
    converted: list[tuple[int, NDArray, NDArray]], address: int
) -> NDArray | None:
    """Finds a buffer's conversion, so that past and present stay one buffer."""
    return next((array for at, _, array in converted if at == address), None)


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    dims = tuple(d.dim_param if d.HasField("dim_param") else d.dim_value for d in kind.shape.dim)
    return Tensor(value.name, kind.elem_type, dims)
