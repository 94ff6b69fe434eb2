"""Products with integer matrices as ONNX Runtime's own operator, MatMulNBits, takes them.

There are two layouts. A product by columns is the faster one for few rows of activations, one by
tiles for more (docs/performance.md). Either holds unsigned numbers, of which 8, or 128, is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpt_trt.arrays.cast import transposed_copy
from mpt_trt.engines.onnxruntime.cuda.rewrites import DOMAIN
from mpt_trt.engines.onnxruntime.external_data import SharedWeight, stored_bytes

INTEGER_BITS = {TensorProto.INT4: 4, TensorProto.INT8: 8}
# Of two's complement nibbles and bytes: what flips their sign bits, so that 0 becomes 8 and 128.
SIGN_BITS = {4: np.uint8(0x88), 8: np.uint8(0x80)}
# Rows of a column that share a stored scale, where the network has one scale for all of it.
BLOCK_OF_COLUMN = 128
# The same of tiles; the only number that ONNX Runtime 1.31 has kernels for.
BLOCK_OF_TILES = 32
ROWS_OF_TILE = 64
BYTES_TOGETHER = 128
# Columns are a multiple of that many, by bits.
COLUMNS_OF_TILES = {4: 64, 8: 32}
# Activations are not rounded.
EXACT = 1


@dataclass(frozen=True)
class IntegerMatrix:
    """Integers `[in_features, out_features]`, scales `[blocks, out_features]` or `[out_features]`.

    block_size: rows that share a scale; None: all. folder: of the network.
    """

    integers: TensorProto
    scales: TensorProto
    block_size: int | None
    folder: Path

    @property
    def bits(self) -> int:
        return INTEGER_BITS[self.integers.data_type]

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.integers.dims
        return height, width

    def fits_tiles(self) -> bool:
        """Whether `prepacked_layout` can take it."""
        height, width = self.shape
        rows = self.block_size or BLOCK_OF_TILES
        return (
            rows % BLOCK_OF_TILES == 0
            and height % ROWS_OF_TILE == 0
            and width % COLUMNS_OF_TILES[self.bits] == 0
        )

    def read_integers(self) -> NDArray[np.uint8]:
        """`[in_features, out_features * bits / 8]`; the lower nibble is the first column's."""
        stored = stored_bytes(self.integers, self.folder).read() ^ SIGN_BITS[self.bits]
        return stored.reshape(self.shape[0], -1)

    def read_scales(self, rows_of_scale: int) -> NDArray:
        """`[out_features, in_features / rows_of_scale]`."""
        height, width = self.shape
        dtype = helper.tensor_dtype_to_np_dtype(self.scales.data_type)
        stored = stored_bytes(self.scales, self.folder).read().view(dtype).reshape(-1, width)
        repeated = np.repeat(stored, height // rows_of_scale // len(stored), axis=0)
        return np.ascontiguousarray(repeated.T)


@dataclass(frozen=True)
class FusedProduct:
    """An operator, its weights, and those of them that it takes as constants only."""

    node: onnx.NodeProto
    inputs: tuple[SharedWeight, ...]
    constants: tuple[SharedWeight, ...] = ()


def column_layout(matrix: IntegerMatrix, node: onnx.NodeProto) -> FusedProduct:
    """In the place of MatMul: integers `[out_features, blocks, block_size * bits / 8]`."""

    def columns() -> NDArray[np.uint8]:
        stored = matrix.read_integers()
        if matrix.bits == 8:
            return transposed_copy(stored)
        pairs = stored.reshape(-1, 2, stored.shape[1])
        return _columns_of_pairs(pairs[:, 0], pairs[:, 1])

    rows = matrix.block_size or BLOCK_OF_COLUMN
    integers, scales = _weights(matrix, rows, columns)
    return FusedProduct(_product(matrix, node, rows), (integers, scales))


def prepacked_layout(matrix: IntegerMatrix, node: onnx.NodeProto) -> FusedProduct:
    """In the place of MatMul: the layout of FasterTransformer's kernels for compute capability 8.

    That of `preprocess_weights_for_mixed_gemm`, in TensorRT-LLM and ONNX Runtime (there,
    `weight_prepacked` of 1). Columns are cut into tiles of 64 rows, and as many tiles as fill 128
    bytes, one of each neighbouring column, lie together. Within a tile, a byte holds the rows k and
    k + 8 of 4 bits each.
    """

    def tiles() -> NDArray[np.uint8]:
        stored = matrix.read_integers()
        if matrix.bits == 8:
            return _interleaved(transposed_copy(_alternating(stored)), ROWS_OF_TILE)
        width = stored.shape[1]
        halves = stored.reshape(-1, 2, 2, 8, width).transpose(2, 0, 3, 1, 4)
        low, high = halves.reshape(2, -1, width)
        return _interleaved(_columns_of_pairs(low, high), ROWS_OF_TILE // 2)

    integers, scales = _weights(matrix, BLOCK_OF_TILES, tiles)
    product = _product(matrix, node, BLOCK_OF_TILES, weight_prepacked=1)
    return FusedProduct(product, (integers,), (scales,))


def _weights(
    matrix: IntegerMatrix, rows_of_scale: int, content: Callable[[], NDArray[np.uint8]]
) -> tuple[SharedWeight, SharedWeight]:
    height, width = matrix.shape
    blocks = height // rows_of_scale
    return (
        SharedWeight(
            matrix.integers.name,
            TensorProto.UINT8,
            (width, blocks, rows_of_scale * matrix.bits // 8),
            content,
        ),
        SharedWeight(
            matrix.scales.name,
            matrix.scales.data_type,
            (width, blocks),
            functools.partial(matrix.read_scales, rows_of_scale),
        ),
    )


def _product(
    matrix: IntegerMatrix, node: onnx.NodeProto, rows_of_scale: int, **more: int
) -> onnx.NodeProto:
    height, width = matrix.shape
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], matrix.integers.name, matrix.scales.name],
        list(node.output),
        name=node.name,
        domain=DOMAIN,
        K=height,
        N=width,
        bits=matrix.bits,
        block_size=rows_of_scale,
        accuracy_level=EXACT,
        **more,
    )


def _columns_of_pairs(low: NDArray[np.uint8], high: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes `[width, n]` of a nibble of `low` and one of `high`, both `[n, width / 2]` bytes."""
    height, pairs = low.shape
    columns = np.empty((pairs, 2, height), np.uint8)
    columns[:, 0] = transposed_copy((low & 0x0F) | (high << 4))
    columns[:, 1] = transposed_copy((low >> 4) | (high & 0xF0))
    return columns.reshape(2 * pairs, height)


def _alternating(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rows 0, 8, 1, 9, ... of every 16."""
    width = rows.shape[1]
    return rows.reshape(-1, 2, 8, width).transpose(0, 2, 1, 3).reshape(-1, width)


def _interleaved(columns: NDArray[np.uint8], tile: int) -> NDArray[np.uint8]:
    """Columns `[width, bytes]` as `[width / n, bytes / tile, n, tile]`, n * tile being 128."""
    width = len(columns)
    tiles = columns.reshape(-1, BYTES_TOGETHER // tile, columns.shape[1] // tile, tile)
    return np.ascontiguousarray(tiles.transpose(0, 2, 1, 3)).reshape(width, -1)
