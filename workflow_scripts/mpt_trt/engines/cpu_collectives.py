"""DistCollective nodes under ONNX Runtime: Python operators that let the ranks meet over MPI.

ONNX Runtime does not know DistCollective. When a graph is loaded, each such node becomes an
operator of onnxruntime-extensions that calls the communicator. Those operators take float32 only,
so there is a Cast on either side.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpt_trt.onnx_graph import COLLECTIVE
from mpt_trt.ranks import Communicator

DOMAIN = "ai.onnx.contrib"
OPERATORS = {b"all_reduce": "MptTrtAllReduce", b"all_gather": "MptTrtAllGather"}


def use_communicator(
    model: onnx.ModelProto, options: onnxruntime.SessionOptions, communicator: Communicator
) -> None:
    """Makes the graph's collectives call `communicator` in sessions with these options."""
    from onnxruntime_extensions import get_library_path

    _register(communicator)
    options.register_custom_ops_library(get_library_path())
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    nodes = [new for node in model.graph.node for new in _replaced(node, types)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _replaced(node: onnx.NodeProto, types: dict[str, int]) -> list[onnx.NodeProto]:
    if node.op_type != COLLECTIVE:
        return [node]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    operator = OPERATORS[attributes["collective_operation"]]
    before, after = f"{node.name}/float", f"{node.name}/met"
    return [
        helper.make_node("Cast", node.input, [before], to=TensorProto.FLOAT),
        helper.make_node(operator, [before], [after], name=node.name, domain=DOMAIN),
        helper.make_node("Cast", [after], node.output, to=types[node.output[0]]),
    ]


def _register(communicator: Communicator) -> None:
    from onnxruntime_extensions import PyCustomOpDef, onnx_op

    types = {"inputs": [PyCustomOpDef.dt_float], "outputs": [PyCustomOpDef.dt_float]}

    @onnx_op(op_type=OPERATORS[b"all_reduce"], **types)
    def all_reduce(value: NDArray[np.float32]) -> NDArray[np.float32]:
        return communicator.all_reduce(value)

    @onnx_op(op_type=OPERATORS[b"all_gather"], **types)
    def all_gather(value: NDArray[np.float32]) -> NDArray[np.float32]:
        return communicator.all_gather(value)
