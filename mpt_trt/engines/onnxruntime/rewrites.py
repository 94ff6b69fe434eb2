"""Rewrites a network in memory for ONNX Runtime, on any device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper

from mpt_trt.arrays.cast import convert
from mpt_trt.engines.onnxruntime.external_data import SharedWeight, left_out, map_tensor
from mpt_trt.engines.onnxruntime.graph_editor import cast, make_node

FLOAT32 = np.dtype(np.float32)
# Attributes with the type of a node's result.
TYPE_ATTRIBUTES = ("to", "output_dtype")
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")


def compute_in_float32(
    model: onnx.ModelProto, element_type: int, folder: Path, options: onnxruntime.SessionOptions
) -> list[onnxruntime.OrtValue]:
    """Converts all values of ONNX type `element_type` in the graph to float32.

    folder: folder of the network. options: options of the session, which get the converted weights.

    Returns the converted weights, which must live as long as the session.
    """
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == element_type:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in TYPE_ATTRIBUTES and attribute.i == element_type:
                attribute.i = TensorProto.FLOAT
    external = {}
    for tensor in graph.initializer:
        if tensor.data_type != element_type:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            external[tensor.name] = convert(map_tensor(tensor, folder), FLOAT32)
            tensor.data_type = TensorProto.FLOAT
        else:
            numbers = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in external.values()]
    options.add_external_initializers(list(external), values)
    return values


def provide_weights(
    model: onnx.ModelProto, weights: list[SharedWeight], options: onnxruntime.SessionOptions
) -> list[onnxruntime.OrtValue]:
    """Adds weights that are computed to the graph, as initializers.

    options: of the session, which get their content.

    Returns the content, which must live as long as the session.
    """
    model.graph.initializer.extend(left_out(weight) for weight in weights)
    values = [weight.as_value() for weight in weights]
    options.add_external_initializers([weight.name for weight in weights], values)
    return values


def scale_queries(model: onnx.ModelProto) -> None:
    """Multiplies attention's queries by its scale, instead of the scores.

    ONNX Runtime's CPU provider has a kernel for the float32 product of a single query with its
    keys, but only without a factor. With one, it copies all keys at every step.
    """
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "Attention":
            [scale] = [each for each in node.attribute if each.name == "scale"]
            factor, scaled = f"{node.name}/scale", f"{node.name}/scaled_query"
            number = np.array(scale.f, np.float32)
            model.graph.initializer.append(numpy_helper.from_array(number, factor))
            nodes.append(make_node("Mul", [node.input[0], factor], scaled))
            node.input[0], scale.f = scaled, 1.0
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def spell_out_scale_types(model: onnx.ModelProto, element_type: int) -> None:
    """Adds Casts for (de)quantization scales whose type differs from the network's.

    element_type: type of the network. ONNX Runtime 1.32 loses the difference when it moves such
    nodes, and then rejects the network (seen with a float16 cache of a single head).
    """
    scales = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        scale_type = scales.get(node.input[1]) if node.op_type in QUANTIZING else None
        if scale_type in (None, element_type):
            nodes.append(node)
        elif node.op_type == "QuantizeLinear":
            nodes += [cast(node.input[0], f"{node.output[0]}/cast", scale_type), node]
            node.input[0] = f"{node.output[0]}/cast"
        else:
            output = node.output[0]
            node.output[0] = f"{output}/dequantized"
            kept = [attribute for attribute in node.attribute if attribute.name != "output_dtype"]
            del node.attribute[:]
            node.attribute.extend(kept)
            nodes += [node, cast(node.output[0], output, element_type)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
