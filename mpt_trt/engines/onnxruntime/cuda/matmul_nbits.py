"""Products with integer matrices through ONNX Runtime's operator MatMulNBits.

There are two layouts of the integers. The column layout is faster for few rows of activations, the
prepacked one for more (docs/appendix/experiments.md). Both store unsigned numbers: 8 (4 bits) or
128 (8 bits) means 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpt_trt.arrays.cast import transposed_copy
from mpt_trt.engines.onnxruntime.external_data import SharedWeight
from mpt_trt.engines.onnxruntime.graph_editor import MICROSOFT_DOMAIN
from mpt_trt.network.external_files import file_part

# Bits of an integer, by ONNX type.
INTEGER_BITS: dict[int, int] = {TensorProto.INT4: 4, TensorProto.INT8: 8}
# Masks, by bits, that flip the sign bits of two's complement, so that 0 becomes 8 or 128.
SIGN_BITS = {4: np.uint8(0x88), 8: np.uint8(0x80)}
# Rows of a column that share a stored scale if the network has one scale for the whole column.
COLUMN_BLOCK_SIZE = 128
# Rows that share a stored scale in the prepacked layout; ONNX Runtime 1.31 has kernels only for
# this number.
PREPACKED_BLOCK_SIZE = 32
TILE_ROWS = 64
INTERLEAVED_BYTES = 128
# The number of columns in the prepacked layout must be a multiple of this, by bits.
PREPACKED_COLUMNS = {4: 64, 8: 32}
# MatMulNBits' accuracy_level without rounding of activations.
EXACT = 1


@dataclass(frozen=True)
class IntegerMatrix:
    """Integers `[in_features, out_features]`, scales `[blocks, out_features]` or `[out_features]`.

    block_size: rows that share a scale; None: all. folder: folder of the network.
    """

    integers: TensorProto
    scales: TensorProto
    block_size: int | None
    folder: Path

    @property
    def bits(self) -> int:
        """Bits of an integer, 4 or 8."""
        return INTEGER_BITS[self.integers.data_type]

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        height, width = self.integers.dims
        return height, width

    def can_be_prepacked(self) -> bool:
        """Returns whether `prepacked_layout` supports the shape and block size."""
        height, width = self.shape
        rows = self.block_size or PREPACKED_BLOCK_SIZE
        return (
            rows % PREPACKED_BLOCK_SIZE == 0
            and height % TILE_ROWS == 0
            and width % PREPACKED_COLUMNS[self.bits] == 0
        )

    def read_integers(self) -> NDArray[np.uint8]:
        """Reads bytes `[in_features, out_features * bits / 8]`; the low nibble comes first."""
        stored = file_part(self.integers, self.folder).read() ^ SIGN_BITS[self.bits]
        return stored.reshape(self.shape[0], -1)

    def read_scales(self, rows_of_scale: int) -> NDArray:
        """Reads scales `[out_features, in_features / rows_of_scale]`."""
        height, width = self.shape
        dtype = helper.tensor_dtype_to_np_dtype(self.scales.data_type)
        stored = file_part(self.scales, self.folder).read().view(dtype).reshape(-1, width)
        repeated = np.repeat(stored, height // rows_of_scale // len(stored), axis=0)
        return np.ascontiguousarray(repeated.T)


@dataclass(frozen=True)
class QuantizedMatMul:
    """A MatMulNBits node and its weights: inputs of the graph, and constants.

    The operator accepts the constants only as initializers.
    """

    node: onnx.NodeProto
    inputs: tuple[SharedWeight, ...]
    constants: tuple[SharedWeight, ...] = ()


def column_layout(matrix: IntegerMatrix, node: onnx.NodeProto) -> QuantizedMatMul:
    """Replaces a MatMul; stores integers as `[out_features, blocks, block_size * bits / 8]`."""

    def columns() -> NDArray[np.uint8]:
        stored = matrix.read_integers()
        if matrix.bits == 8:
            return transposed_copy(stored)
        pairs = stored.reshape(-1, 2, stored.shape[1])
        return _columns_of_pairs(pairs[:, 0], pairs[:, 1])

    rows = matrix.block_size or COLUMN_BLOCK_SIZE
    integers, scales = _weights(matrix, rows, columns)
    return QuantizedMatMul(_matmul_nbits(matrix, node, rows), (integers, scales))


def prepacked_layout(matrix: IntegerMatrix, node: onnx.NodeProto) -> QuantizedMatMul:
    """Replaces a MatMul; stores integers as FasterTransformer does for compute capability 8.

    The layout is that of `preprocess_weights_for_mixed_gemm` in TensorRT-LLM and of
    `weight_prepacked = 1` in ONNX Runtime. Columns are cut into tiles of 64 rows. Tiles of
    neighbouring columns are interleaved, as many as fill 128 bytes. Within a tile, a byte of 4-bit
    integers contains the rows k and k + 8.
    """

    def tiles() -> NDArray[np.uint8]:
        stored = matrix.read_integers()
        if matrix.bits == 8:
            return _interleaved(transposed_copy(_alternating(stored)), TILE_ROWS)
        width = stored.shape[1]
        halves = stored.reshape(-1, 2, 2, 8, width).transpose(2, 0, 3, 1, 4)
        low, high = halves.reshape(2, -1, width)
        return _interleaved(_columns_of_pairs(low, high), TILE_ROWS // 2)

    integers, scales = _weights(matrix, PREPACKED_BLOCK_SIZE, tiles)
    matmul = _matmul_nbits(matrix, node, PREPACKED_BLOCK_SIZE, weight_prepacked=1)
    return QuantizedMatMul(matmul, (integers,), (scales,))


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


def _matmul_nbits(
    matrix: IntegerMatrix, node: onnx.NodeProto, rows_of_scale: int, **more: int
) -> onnx.NodeProto:
    height, width = matrix.shape
    options: dict[str, Any] = {
        "K": height,
        "N": width,
        "bits": matrix.bits,
        "block_size": rows_of_scale,
        "accuracy_level": EXACT,
        **more,
    }
    return helper.make_node(
        "MatMulNBits",
        [node.input[0], matrix.integers.name, matrix.scales.name],
        list(node.output),
        name=node.name,
        domain=MICROSOFT_DOMAIN,
        **options,
    )


def _columns_of_pairs(low: NDArray[np.uint8], high: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Joins nibbles of `low` and `high`, both bytes `[n, width / 2]`, to bytes `[width, n]`."""
    height, pairs = low.shape
    columns = np.empty((pairs, 2, height), np.uint8)
    columns[:, 0] = transposed_copy((low & 0x0F) | (high << 4))
    columns[:, 1] = transposed_copy((low >> 4) | (high & 0xF0))
    return columns.reshape(2 * pairs, height)


def _alternating(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Reorders every 16 rows as 0, 8, 1, 9, ..."""
    width = rows.shape[1]
    return rows.reshape(-1, 2, 8, width).transpose(0, 2, 1, 3).reshape(-1, width)


def _interleaved(columns: NDArray[np.uint8], tile: int) -> NDArray[np.uint8]:
    """Reorders columns `[width, bytes]` as `[width / n, bytes / tile, n, tile]`; n * tile = 128."""
    width = len(columns)
    tiles = columns.reshape(-1, INTERLEAVED_BYTES // tile, columns.shape[1] // tile, tile)
    return np.ascontiguousarray(tiles.transpose(0, 2, 1, 3)).reshape(width, -1)
