"""Edits ONNX graphs in memory: nodes, constants, and makers and readers of values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

MICROSOFT_DOMAIN = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

Replacements = dict[str, list[onnx.NodeProto]]
"""New nodes by name of the node that they replace."""


class Graph:
    """A graph that is being edited.

    maker: the node that makes a value. readers: the nodes that read it. Both describe the graph as
    it was read.
    """

    def __init__(self, model: onnx.ModelProto):
        self._model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.maker = {output: node for node in self.nodes for output in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)

    def constant(self, name: str, values: list[int]) -> str:
        """Adds an int64 vector to the graph and returns its name."""
        self.initializers[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def store(
        self, replacements: Mapping[str, list[onnx.NodeProto]] = MappingProxyType({})
    ) -> None:
        """Writes the graph back, with replacements, and without initializers that no node reads."""
        nodes = [new for node in self.nodes for new in replacements.get(node.name, [node])]
        used = {name for node in nodes for name in node.input}
        kept = [tensor for name, tensor in self.initializers.items() if name in used]
        del self._model.graph.node[:], self._model.graph.initializer[:]
        self._model.graph.node.extend(nodes)
        self._model.graph.initializer.extend(kept)
        declared = {each.domain for each in self._model.opset_import}
        uses_own_operators = any(node.domain == MICROSOFT_DOMAIN for node in nodes)
        if uses_own_operators and MICROSOFT_DOMAIN not in declared:
            self._model.opset_import.append(helper.make_opsetid(MICROSOFT_DOMAIN, 1))


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The node's attributes by name."""
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def make_node(
    op_type: str, inputs: list[str], output: str, domain: str | None = None, **options: Any
) -> onnx.NodeProto:
    """Makes a node with one output of the same name. options: attributes of the node."""
    return helper.make_node(op_type, inputs, [output], output, domain=domain, **options)


def cast(value: str, output: str, element_type: int) -> onnx.NodeProto:
    """Makes a node that converts `value` to another ONNX type."""
    return helper.make_node("Cast", [value], [output], name=f"{output}/cast", to=element_type)


def reshape(value: str, shape: str, output: str) -> onnx.NodeProto:
    """Makes a node that reshapes `value`. shape: name of a constant."""
    return make_node("Reshape", [value, shape], output)
