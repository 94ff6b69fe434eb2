"""Builds an ONNX graph node by node, with each weight in a separate file.

A node has the name of its output, so names in a graph viewer follow the model:
`layers.3.mlp.dense_h_to_4h`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mpt_trt.model.sharding import Range, Rank

OPSET = 24
# The first IR version with opset 24's types, because older readers reject newer versions.
IR_VERSION = 11
WEIGHTS_FOLDER = "weights"
# DistCollective is not a standard operator; TensorRT's parser accepts it in any domain.
COLLECTIVE_DOMAIN = "mpt_trt"
COLLECTIVE = "DistCollective"
ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "int4": TensorProto.INT4,
}

Content = Path | Callable[[], Iterator[NDArray]]
"""Source of a file's bytes: another file, or pieces that are computed when it is written."""


@dataclass(frozen=True)
class StoredTensor:
    """A weight in a separate file. element_type: ONNX type; INT4 has two elements per byte."""

    file_name: str
    element_type: int
    shape: tuple[int, ...]
    content: Content


def external_tensor(
    name: str, element_type: int, shape: tuple[int, ...], location: str, **place: int
) -> TensorProto:
    """Makes an initializer whose content is a file, or the part of it at `place`.

    place: `offset` and `length`, in bytes.
    """
    tensor = TensorProto(name=name, data_type=element_type, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@dataclass
class GraphBuilder:
    """Collects nodes, inputs, outputs and initializers; values are identified by name.

    weights: the rank's stored tensors by weight name. used: content of the files that nodes read,
    by file name.
    """

    weights: dict[str, StoredTensor]
    element_type: int
    rank: Rank
    used: dict[str, Content] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    value_types: list[onnx.ValueInfoProto] = field(default_factory=list)

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Adds a node with one output of the same name, and returns that name."""
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def input(self, name: str, element_type: int, shape: list[str | int]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def output(self, name: str, element_type: int, shape: list[str | int]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, element_type, shape))

    def constant(self, name: str, values: object, dtype: type) -> str:
        """Adds a small tensor to the graph itself; a name is stored once."""
        self.initializers[name] = numpy_helper.from_array(np.asarray(values, dtype), name)
        return name

    def scalar(self, name: str, value: float) -> str:
        """Adds a number in the network's type."""
        self.initializers[name] = helper.make_tensor(name, self.element_type, [], [value])
        return name

    def zeros(self, name: str, shape: tuple[int, ...]) -> str:
        """Adds zeros in the network's type."""
        self.initializers[name] = helper.make_tensor(
            name, self.element_type, shape, np.zeros(math.prod(shape))
        )
        return name

    def split(self, value: str, parts: list[str], sizes: list[int], axis: int, name: str) -> None:
        """Splits `value` along `axis` into values named `parts`."""
        lengths = self.constant(f"sizes_{'_'.join(map(str, sizes))}", sizes, np.int64)
        self.nodes.append(helper.make_node("Split", [value, lengths], parts, name=name, axis=axis))

    def has_weight(self, name: str) -> bool:
        return name in self.weights

    def weight(self, name: str) -> str:
        """Adds a stored tensor as an initializer."""
        return self._external(name, self.weights[name], self.weights[name].shape)

    def weight_rows(self, name: str, rows: Range) -> str:
        """Adds some rows (first dimension) of a stored tensor as an initializer."""
        stored = self.weights[name]
        shape = (len(rows), *stored.shape[1:])
        itemsize = helper.tensor_dtype_to_np_dtype(stored.element_type).itemsize
        row_bytes = math.prod(shape[1:]) * itemsize
        place = {"offset": rows.start * row_bytes, "length": len(rows) * row_bytes}
        return self._external(f"{name}.rows", stored, shape, **place)

    def _external(
        self, name: str, stored: StoredTensor, shape: tuple[int, ...], **place: int
    ) -> str:
        self.used[stored.file_name] = stored.content
        location = f"{WEIGHTS_FOLDER}/{stored.file_name}"
        self.initializers[name] = external_tensor(
            name, stored.element_type, shape, location, **place
        )
        return name

    def all_reduce(self, value: str, output: str, element_type: int | None = None) -> str:
        """Adds the sum over ranks; for a single rank, returns the value itself.

        element_type: type of the value; by default the network's.
        """
        operation = {"collective_operation": "all_reduce", "reduce_op": "sum"}
        return self._collective(value, output, operation, element_type or self.element_type)

    def all_gather(self, value: str, output: str) -> str:
        """Adds the concatenation of the ranks' values along the first axis."""
        operation = {"collective_operation": "all_gather", "reduce_op": "none"}
        return self._collective(value, output, operation, self.element_type)

    def _collective(
        self, value: str, output: str, operation: dict[str, str], element_type: int
    ) -> str:
        """Adds a node in the form that TensorRT's parser turns into its own collective layer.

        group_size 0 means all ranks (the parser's checkDistCollective).
        """
        if self.rank.tp_size == 1:
            return value
        # No standard defines this operator's output type, so the graph declares it.
        self.value_types.append(helper.make_tensor_value_info(output, element_type, None))
        return self.node(
            COLLECTIVE,
            [value],
            output,
            domain=COLLECTIVE_DOMAIN,
            root=-1,
            group_size=0,
            nb_rank=self.rank.tp_size,
            **operation,
        )

    def to_model(self, name: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            name,
            self.inputs,
            self.outputs,
            list(self.initializers.values()),
            value_info=self.value_types,
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(*domain) for domain in self._domains()],
            ir_version=IR_VERSION,
            producer_name="mpt-trt",
        )

    def _domains(self) -> list[tuple[str, int]]:
        return [("", OPSET)] + [(COLLECTIVE_DOMAIN, 1)] * (self.rank.tp_size > 1)
