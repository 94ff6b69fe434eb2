"""Takes large weights out of a network: inputs, which several sessions read in one place.

ONNX Runtime would load them once for every session that it opens on a network.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from mpt_trt.engines.onnxruntime.cuda.matmul_nbits import (
    BLOCK_OF_COLUMN,
    INTEGER_BITS,
    FusedProduct,
    IntegerMatrix,
    column_layout,
    prepacked_layout,
)
from mpt_trt.engines.onnxruntime.cuda.rewrites import Graph, attributes
from mpt_trt.engines.onnxruntime.external_data import SharedWeight, stored_bytes
from mpt_trt.network.graph import external_tensor

# Smaller tensors stay: norms, biases, and scales of whole columns.
LEAST_BYTES = 1 << 18


@dataclass(frozen=True)
class SharedWeights:
    """Inputs of the network; and initializers that it leaves to whoever loads it."""

    inputs: list[SharedWeight]
    constants: list[SharedWeight]


def share_weights(
    model: onnx.ModelProto, folder: Path, tiled_bits: Collection[int] = ()
) -> SharedWeights:
    """Makes inputs of large external weights, and of integers that a product takes dequantized.

    folder: that of the network. The nodes that dequantize such a matrix and multiply by it become
    one operator of ONNX Runtime (MatMulNBits), which reads integers. tiled_bits: of integers that
    are laid out in tiles, if all of the network's can be; see integer_products.
    """
    products = _fuse_integer_products(model, folder, tiled_bits)
    inputs = [weight for product in products for weight in product.inputs]
    constants = [weight for product in products for weight in product.constants]
    graph = Graph(model)
    for tensor in list(graph.initializers.values()):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        stored = stored_bytes(tensor, folder)
        if stored.size >= LEAST_BYTES and tensor.data_type != TensorProto.INT4:
            inputs.append(SharedWeight(tensor.name, tensor.data_type, tuple(tensor.dims), stored))
            del graph.initializers[tensor.name]
    graph.store()
    for weight in inputs:
        value = helper.make_tensor_value_info(weight.name, weight.element_type, weight.shape)
        model.graph.input.append(value)
    model.graph.initializer.extend(_left_out(weight) for weight in constants)
    return SharedWeights(inputs, constants)


def _left_out(weight: SharedWeight) -> TensorProto:
    """An initializer whose content is not where it says."""
    location = "given when the network is loaded"
    return external_tensor(weight.name, weight.element_type, weight.shape, location)


def _fuse_integer_products(
    model: onnx.ModelProto, folder: Path, tiled_bits: Collection[int]
) -> list[FusedProduct]:
    graph = Graph(model)
    found = dict(_integer_products(graph, folder))
    # All or none: a session's products either use the kernels for tiles or do not.
    is_tiled = all(each.bits in tiled_bits and each.fits_tiles() for each, _ in found.values())
    fuse = prepacked_layout if is_tiled else column_layout
    replaced: dict[str, list[onnx.NodeProto]] = {}
    products: list[FusedProduct] = []
    for dequantizing, (matrix, node) in found.items():
        products.append(fuse(matrix, node))
        del graph.initializers[matrix.integers.name], graph.initializers[matrix.scales.name]
        replaced |= {dequantizing: [], node.name: [products[-1].node]}
    graph.store(replaced)
    return products


def _integer_products(
    graph: Graph, folder: Path
) -> Iterator[tuple[str, tuple[IntegerMatrix, onnx.NodeProto]]]:
    """Matrices that a product alone takes, and the product, by the node that dequantizes them."""
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear" or node.input[0] not in graph.initializers:
            continue
        integers, scales = (graph.initializers[name] for name in node.input[:2])
        readers = graph.readers[node.output[0]]
        if _is_fusible(node, integers, [reader.op_type for reader in readers]):
            block_size = attributes(node).get("block_size")
            yield node.name, (IntegerMatrix(integers, scales, block_size, folder), readers[0])


def _is_fusible(node: onnx.NodeProto, integers: TensorProto, readers: list[str]) -> bool:
    """Whether the matrix, `[in_features, out_features]`, has scales by rows or by column."""
    if readers != ["MatMul"] or integers.data_type not in INTEGER_BITS or len(node.input) > 2:
        return False
    found = attributes(node)
    if found.get("output_dtype", 0):
        return False
    block_size = found.get("block_size", 0)
    if block_size:
        return found.get("axis", 1) == 0
    return found.get("axis", 1) == 1 and integers.dims[0] % BLOCK_OF_COLUMN == 0
