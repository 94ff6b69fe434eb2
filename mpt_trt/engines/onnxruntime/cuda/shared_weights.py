"""Turns large weights of a network into inputs, so that several sessions read one copy.

ONNX Runtime would load the weights once per session.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from mpt_trt.engines.onnxruntime.cuda.matmul_nbits import (
    COLUMN_BLOCK_SIZE,
    INTEGER_BITS,
    IntegerMatrix,
    QuantizedMatMul,
    column_layout,
    prepacked_layout,
)
from mpt_trt.engines.onnxruntime.external_data import SharedWeight, left_out
from mpt_trt.engines.onnxruntime.graph_editor import Graph, Replacements, attributes
from mpt_trt.engines.onnxruntime.integer_tables import read_integer_tables
from mpt_trt.network.external_files import FilePart, file_part

# Smaller tensors stay in the graph: norms, biases, and scales of whole columns.
LEAST_BYTES = 1 << 18


@dataclass(frozen=True)
class SharedWeights:
    """Weights that became inputs of the network, and constants that its loader must provide."""

    inputs: list[SharedWeight]
    constants: list[SharedWeight]


def share_weights(
    model: onnx.ModelProto,
    folder: Path,
    prepacked_bits: Collection[int] = (),
    element_type: int = TensorProto.FLOAT,
) -> SharedWeights:
    """Turns large external weights, and integers that a product reads dequantized, into inputs.

    The nodes that dequantize such integers and multiply by them become one operator of ONNX
    Runtime, MatMulNBits, which reads integers.

    folder: folder of the network. prepacked_bits: bits of the integers to store in the prepacked
    layout, if it supports all matrices of the network; see `matmul_nbits`. element_type: the
    network's ONNX type.
    """
    matmuls = _fuse_quantized_matmuls(model, folder, prepacked_bits)
    inputs = read_integer_tables(model, folder, element_type)
    inputs += [weight for matmul in matmuls for weight in matmul.inputs]
    inputs += _read_slices(model, folder)
    constants = [weight for matmul in matmuls for weight in matmul.constants]
    graph = Graph(model)
    for tensor in list(graph.initializers.values()):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        stored = file_part(tensor, folder)
        if stored.size >= LEAST_BYTES and tensor.data_type != TensorProto.INT4:
            inputs.append(SharedWeight(tensor.name, tensor.data_type, tuple(tensor.dims), stored))
            del graph.initializers[tensor.name]
    graph.store()
    for weight in inputs:
        value = helper.make_tensor_value_info(weight.name, weight.element_type, weight.shape)
        model.graph.input.append(value)
    model.graph.initializer.extend(left_out(weight) for weight in constants)
    return SharedWeights(inputs, constants)


def _read_slices(model: onnx.ModelProto, folder: Path) -> list[SharedWeight]:
    """Turns slices of a matrix's rows into weights, which steps would otherwise copy."""
    graph = Graph(model)
    weights: list[SharedWeight] = []
    replacements: Replacements = {}
    for node in graph.nodes:
        if node.op_type != "Slice" or not all(name in graph.initializers for name in node.input):
            continue
        matrix = graph.initializers[node.input[0]]
        [start], [end], [axis] = (
            numpy_helper.to_array(graph.initializers[name]).tolist() for name in node.input[1:]
        )
        if axis != 0 or matrix.data_location != TensorProto.EXTERNAL:
            continue
        stored, num_rows = file_part(matrix, folder), matrix.dims[0]
        row_bytes = stored.size // num_rows
        rows = range(num_rows)[start:end]
        part = FilePart(stored.path, stored.offset + rows.start * row_bytes, len(rows) * row_bytes)
        shape = (len(rows), *matrix.dims[1:])
        weights.append(SharedWeight(node.output[0], matrix.data_type, shape, part))
        replacements[node.name] = []
    graph.store(replacements)
    return weights


def _fuse_quantized_matmuls(
    model: onnx.ModelProto, folder: Path, prepacked_bits: Collection[int]
) -> list[QuantizedMatMul]:
    graph = Graph(model)
    candidates = list(_dequantized_matmuls(graph, folder))
    # All or none, because the kernels of the prepacked layout are on or off for a whole session.
    is_prepacked = all(
        each.matrix.bits in prepacked_bits and each.matrix.can_be_prepacked() for each in candidates
    )
    layout = prepacked_layout if is_prepacked else column_layout
    replacements: Replacements = {}
    matmuls: list[QuantizedMatMul] = []
    for each in candidates:
        matmuls.append(layout(each.matrix, each.matmul))
        del graph.initializers[each.matrix.integers.name]
        del graph.initializers[each.matrix.scales.name]
        replacements |= {each.dequantize.name: [], each.matmul.name: [matmuls[-1].node]}
    graph.store(replacements)
    return matmuls


@dataclass(frozen=True)
class _DequantizedMatMul:
    """A matrix of integers, the node that dequantizes it, and its only reader."""

    matrix: IntegerMatrix
    dequantize: onnx.NodeProto
    matmul: onnx.NodeProto


def _dequantized_matmuls(graph: Graph, folder: Path) -> Iterator[_DequantizedMatMul]:
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear" or node.input[0] not in graph.initializers:
            continue
        integers, scales = (graph.initializers[name] for name in node.input[:2])
        readers = graph.readers[node.output[0]]
        if _is_fusible(node, integers, [reader.op_type for reader in readers]):
            block_size = attributes(node).get("block_size")
            matrix = IntegerMatrix(integers, scales, block_size, folder)
            yield _DequantizedMatMul(matrix, node, readers[0])


def _is_fusible(node: onnx.NodeProto, integers: TensorProto, readers: list[str]) -> bool:
    """Returns whether only a MatMul reads the matrix, with scales per block of rows or column.

    node: the matrix's DequantizeLinear. integers: `[in_features, out_features]`.
    """
    if readers != ["MatMul"] or integers.data_type not in INTEGER_BITS or len(node.input) > 2:
        return False
    options = attributes(node)
    if options.get("output_dtype", 0):
        return False
    axis = options.get("axis", 1)
    if options.get("block_size", 0):
        return axis == 0
    return axis == 1 and integers.dims[0] % COLUMN_BLOCK_SIZE == 0
