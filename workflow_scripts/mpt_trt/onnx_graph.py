"""Builds an ONNX graph node by node, with weights that stay in the files of an FT checkpoint.

Values are referred to by name, and a node is named like its output, so that names in a graph viewer
follow the model: `layers.3.mlp.dense_h_to_4h`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mpt_trt.ft_layout import FtFile
from mpt_trt.sharding import Range, Shard

OPSET = 24
# The first IR version that knows opset 24's types; newer ones are refused by older readers.
IR_VERSION = 11
WEIGHTS_FOLDER = "weights"
# DistCollective is no standard operator; TensorRT's parser knows it by its type in any domain.
COLLECTIVE_DOMAIN = "mpt_trt"
COLLECTIVE = "DistCollective"
ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


@dataclass
class GraphBuilder:
    """Collects nodes, inputs, outputs and initializers; values are referred to by name.

    weights: the rank's FT files by weight name. used: those that a node has read.
    """

    weights: dict[str, FtFile]
    element_type: int
    shard: Shard
    used: dict[str, FtFile] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    value_types: list[onnx.ValueInfoProto] = field(default_factory=list)

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: object) -> str:
        """Adds a node with one output, which is named like the node, and returns that name."""
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def input(self, name: str, element_type: int, shape: list[str | int]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def output(self, name: str, element_type: int, shape: list[str | int]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, element_type, shape))

    def constant(self, name: str, values: object, dtype: type) -> str:
        """A small tensor stored in the graph itself; the same name is stored once."""
        self.initializers[name] = numpy_helper.from_array(np.asarray(values, dtype), name)
        return name

    def scalar(self, name: str, value: float) -> str:
        """A number in the network's own type."""
        self.initializers[name] = helper.make_tensor(name, self.element_type, [], [value])
        return name

    def zeros(self, name: str, shape: tuple[int, ...]) -> str:
        """Zeros in the network's own type."""
        self.initializers[name] = helper.make_tensor(
            name, self.element_type, shape, np.zeros(math.prod(shape))
        )
        return name

    def split(self, value: str, parts: list[str], sizes: list[int], axis: int, name: str) -> None:
        """Cuts `value` along `axis` into values named `parts`."""
        lengths = self.constant(f"sizes_{'_'.join(map(str, sizes))}", sizes, np.int64)
        self.nodes.append(helper.make_node("Split", [value, lengths], parts, name=name, axis=axis))

    def has_weight(self, name: str) -> bool:
        """Whether the checkpoint has the tensor and it is not FT's placeholder of zeros."""
        file = self.weights.get(name)
        return file is not None and file.weight.hf_name is not None

    def weight(self, name: str) -> str:
        """An FT file as an initializer."""
        return self._external(name, self.weights[name], self.weights[name].shape)

    def weight_rows(self, name: str, rows: Range) -> str:
        """Some rows (the first dimension) of an FT file as an initializer."""
        file = self.weights[name]
        shape = (len(rows), *file.shape[1:])
        itemsize = helper.tensor_dtype_to_np_dtype(self.element_type).itemsize
        row_bytes = math.prod(shape[1:]) * itemsize
        place = {"offset": rows.start * row_bytes, "length": len(rows) * row_bytes}
        return self._external(f"{name}.rows", file, shape, **place)

    def _external(self, name: str, file: FtFile, shape: tuple[int, ...], **place: int) -> str:
        self.used[file.name] = file
        tensor = TensorProto(name=name, data_type=self.element_type, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=f"{WEIGHTS_FOLDER}/{file.name}")
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers[name] = tensor
        return name

    def all_reduce(self, value: str, output: str, element_type: int | None = None) -> str:
        """The sum over ranks; the value itself when there is one rank.

        element_type: of the value; the network's own when not given.
        """
        operation = {"collective_operation": "all_reduce", "reduce_op": "sum"}
        return self._collective(value, output, operation, element_type or self.element_type)

    def all_gather(self, value: str, output: str) -> str:
        """The ranks' values one after the other along the first axis."""
        operation = {"collective_operation": "all_gather", "reduce_op": "none"}
        return self._collective(value, output, operation, self.element_type)

    def _collective(
        self, value: str, output: str, operation: dict[str, str], element_type: int
    ) -> str:
        """A node in the form that TensorRT's parser turns into its own collective layer.

        group_size 0 means all ranks (the parser's checkDistCollective).
        """
        if self.shard.tp_size == 1:
            return value
        # No standard says what type comes out of this operator, so the graph does.
        self.value_types.append(helper.make_tensor_value_info(output, element_type, None))
        return self.node(
            COLLECTIVE,
            [value],
            output,
            domain=COLLECTIVE_DOMAIN,
            root=-1,
            group_size=0,
            nb_rank=self.shard.tp_size,
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
        return [("", OPSET)] + [(COLLECTIVE_DOMAIN, 1)] * (self.shard.tp_size > 1)
