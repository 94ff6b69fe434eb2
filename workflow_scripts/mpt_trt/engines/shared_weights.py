"""Takes large weights out of a network: inputs, which several sessions read in one place.

ONNX Runtime would load them once for every session that it opens on a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpt_trt.engines.cuda_rewrites import DOMAIN, Graph, attributes
from mpt_trt.engines.external_data import StoredBytes, stored_bytes
from mpt_trt.numerics import transpose

# Smaller tensors stay: norms, biases, and scales of whole columns.
LEAST_BYTES = 1 << 18
# Of two's complement nibbles and bytes: what flips their sign bits, so that 0 becomes 8 and 128.
SIGN_BITS = {4: np.uint8(0x88), 8: np.uint8(0x80)}
# Rows of a column that share a stored scale, where the network has one scale for all of it.
BLOCK_OF_COLUMN = 128
INTEGER_BITS = {TensorProto.INT4: 4, TensorProto.INT8: 8}


@dataclass(frozen=True)
class SharedWeight:
    """An input that takes a weight. element_type: ONNX's. content: its bytes, or what makes
    them.
    """

    name: str
    element_type: int
    shape: tuple[int, ...]
    content: StoredBytes | Callable[[], NDArray]

    @property
    def size(self) -> int:
        itemsize = helper.tensor_dtype_to_np_dtype(self.element_type).itemsize
        return math.prod(self.shape) * itemsize

    def read(self) -> NDArray:
        """The weight's bytes in a contiguous array."""
        found = self.content
        return found.read() if isinstance(found, StoredBytes) else found()


def share_weights(model: onnx.ModelProto, folder: Path) -> list[SharedWeight]:
    """Makes inputs of large external weights, and of integers that a product takes dequantized.

    folder: that of the network. The nodes that dequantize such a matrix and multiply by it become
    one operator of ONNX Runtime (MatMulNBits), which reads integers.
    """
    weights = _fuse_integer_products(model, folder)
    graph = Graph(model)
    for tensor in list(graph.initializers.values()):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        stored = stored_bytes(tensor, folder)
        if stored.size >= LEAST_BYTES and tensor.data_type != TensorProto.INT4:
            weights.append(SharedWeight(tensor.name, tensor.data_type, tuple(tensor.dims), stored))
            del graph.initializers[tensor.name]
    graph.store()
    for weight in weights:
        value = helper.make_tensor_value_info(weight.name, weight.element_type, weight.shape)
        model.graph.input.append(value)
    return weights


def _fuse_integer_products(model: onnx.ModelProto, folder: Path) -> list[SharedWeight]:
    graph = Graph(model)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    weights: list[SharedWeight] = []
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear" or node.input[0] not in graph.initializers:
            continue
        integers, scales = (graph.initializers[name] for name in node.input[:2])
        readers = graph.readers[node.output[0]]
        if not _is_fusible(node, integers, [reader.op_type for reader in readers]):
            continue
        [product] = readers
        matrix = _IntegerMatrix(integers, scales, attributes(node).get("block_size"), folder)
        weights += matrix.weights()
        del graph.initializers[integers.name], graph.initializers[scales.name]
        replaced |= {node.name: [], product.name: [matrix.product(product)]}
    graph.store(replaced)
    return weights


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


@dataclass(frozen=True)
class _IntegerMatrix:
    """Integers `[in_features, out_features]`, scales `[blocks, out_features]` or `[out_features]`.

    MatMulNBits has them by column, unsigned: `[out_features, blocks, block_size * bits / 8]`, and
    scales `[out_features, blocks]`; what stands for 0 is 8, or 128.
    """

    integers: TensorProto
    scales: TensorProto
    block_size: int | None
    folder: Path

    @property
    def bits(self) -> int:
        return INTEGER_BITS[self.integers.data_type]

    @property
    def rows_of_scale(self) -> int:
        return self.block_size or BLOCK_OF_COLUMN

    @property
    def blocks(self) -> int:
        return self.integers.dims[0] // self.rows_of_scale

    def product(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """In the place of MatMul."""
        return helper.make_node(
            "MatMulNBits",
            [node.input[0], self.integers.name, self.scales.name],
            list(node.output),
            name=node.name,
            domain=DOMAIN,
            K=self.integers.dims[0],
            N=self.integers.dims[1],
            bits=self.bits,
            block_size=self.rows_of_scale,
            # Activations are not rounded.
            accuracy_level=1,
        )

    def weights(self) -> Iterator[SharedWeight]:
        _, width = self.integers.dims
        bytes_of_block = self.rows_of_scale * self.bits // 8
        shape = (width, self.blocks, bytes_of_block)
        yield SharedWeight(self.integers.name, TensorProto.UINT8, shape, self._columns)
        shape = (width, self.blocks)
        yield SharedWeight(self.scales.name, self.scales.data_type, shape, self._scales_of_columns)

    def _columns(self) -> NDArray[np.uint8]:
        height, width = self.integers.dims
        stored = stored_bytes(self.integers, self.folder).read() ^ SIGN_BITS[self.bits]
        if self.bits == 8:
            return _transposed(stored.reshape(height, width))
        pairs = stored.reshape(height // 2, 2, width // 2)
        even, odd = pairs[:, 0], pairs[:, 1]
        columns = np.empty((width // 2, 2, height // 2), np.uint8)
        columns[:, 0] = _transposed((even & 0x0F) | (odd << 4))
        columns[:, 1] = _transposed((even >> 4) | (odd & 0xF0))
        return columns

    def _scales_of_columns(self) -> NDArray:
        dtype = helper.tensor_dtype_to_np_dtype(self.scales.data_type)
        stored = stored_bytes(self.scales, self.folder).read().view(dtype)
        width = self.integers.dims[1]
        by_block = np.broadcast_to(stored.reshape(-1, width), (self.blocks, width))
        return np.ascontiguousarray(by_block.T)


def _transposed(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    target = np.empty(block.shape[::-1], np.uint8)
    transpose(block, target)
    return target
