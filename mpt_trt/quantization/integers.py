"""Symmetric integer quantization of matrices, in blocks of rows: pure functions of NumPy arrays.

Matrices are `[in_features, out_features]`, as FT stores them and a MatMul expects them. They may be
memory-mapped and of any float type; the arithmetic is float32, on a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import convert

Word = TypeVar("Word", np.uint8, np.uint64)

FLOAT32 = np.dtype(np.float32)
# Elements per block; its temporaries must stay in the processor's cache.
BLOCK_ELEMENTS = 1 << 18
# Mask of the lower half of each byte of a word.
LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
# Bits of the largest float32 below 0.5, and of the sign.
BELOW_HALF, SIGN = np.uint32(0x3EFFFFFF), np.uint32(0x80000000)


def row_blocks(matrix: NDArray[Any], multiple: int = 1) -> Iterator[NDArray[Any]]:
    """Yields successive blocks of rows; the number of rows is a multiple of `multiple`."""
    step = max(1, BLOCK_ELEMENTS // (matrix.shape[1] * multiple)) * multiple
    for start in range(0, len(matrix), step):
        yield matrix[start : start + step]


def column_amax(matrix: NDArray[Any]) -> NDArray[np.float32]:
    """Computes the amax of each column, float32 `[out_features]`."""
    amax = np.zeros(matrix.shape[1], np.float32)
    for block in row_blocks(matrix):
        # Without the sign bit, unsigned integers sort like the absolute values they encode.
        bits = np.ascontiguousarray(block).view(f"u{block.itemsize}")
        block_amax = (bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)).max(axis=0)
        np.maximum(amax, _float32(block_amax.view(matrix.dtype)), out=amax)
    return amax


def group_amax(matrix: NDArray[Any], group_size: int) -> NDArray[np.float32]:
    """Computes the amax of each group of rows in each column.

    Returns float32 `[in_features / group_size, out_features]`.
    """
    starts = range(0, len(matrix), group_size)
    return np.stack([column_amax(matrix[start : start + group_size]) for start in starts])


def quantize(
    matrix: NDArray[Any], scales: NDArray[np.float32], bits: int
) -> Iterator[NDArray[np.int8]]:
    """Yields blocks of rows of round(matrix / scale), clipped to the signed range of `bits` bits.

    scales: float32 `[groups, out_features]`, each for in_features / groups rows; columns of zeros
    may have scale 0. Half is rounded away from zero, as in FT's weight-only layers. If groups have
    an even number of rows, so do all blocks except the last.
    """
    limit = 1 << (bits - 1)
    nonzero = np.where(scales == 0, np.float32(1), scales)
    group_size = len(matrix) // len(scales)
    for group, scale in enumerate(nonzero):
        rows = matrix[group * group_size :][:group_size]
        for block in row_blocks(rows, 2):
            shifted = _past_halves(_float32(block) / scale)
            # The conversion truncates.
            yield np.clip(shifted, -limit, limit - 1, out=shifted).astype(np.int8)


def _past_halves(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Moves values away from zero so that truncation rounds them, half away from zero.

    They move by the largest number below 0.5. With 0.5, values just below a half would reach the
    next integer.
    """
    bits = values.view(np.uint32) & SIGN
    bits |= BELOW_HALF
    moved = bits.view(np.float32)
    return np.add(moved, values, out=moved)


def packed(blocks: Iterator[NDArray[np.int8]]) -> Iterator[NDArray[np.uint8]]:
    """Applies `pack_int4` to blocks with an even number of rows; the last one may be odd."""
    return map(pack_int4, blocks)


def pack_int4(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Packs two values per byte along the flattened array, the even one in the low nibble.

    This is the layout of ONNX's INT4 and of FT's weight-only files. If the number of values is odd,
    the last high nibble is 0.
    """
    flat = values.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    pairs = flat.view("<u2")
    high = (pairs >> np.uint16(4)) & np.uint16(0xF0)
    return ((pairs & np.uint16(0xF)) | high).astype(np.uint8)


def pack_int4_rows(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Packs two values per byte down each column, the even row's in the low nibble.

    The number of rows must be even. The transpose is `pack_int4` of the transposed values.
    """
    # Eight bytes at a time if rows are whole words, because shifted masked nibbles stay in their
    # byte.
    if values.flags.c_contiguous and values.shape[1] % 8 == 0:
        words = values.view(np.uint64)
        return _packed_pairs(words, np.uint64(LOW_NIBBLES), np.uint64(4)).view(np.uint8)
    return _packed_pairs(values.view(np.uint8), np.uint8(LOW_NIBBLES & 0xFF), np.uint8(4))


def _packed_pairs(rows: NDArray[Word], low_nibbles: Word, nibble_bits: Word) -> NDArray[Word]:
    pairs: NDArray[Word] = rows[0::2] & low_nibbles
    pairs |= (rows[1::2] & low_nibbles) << nibble_bits
    return pairs


def stored_scales(scales: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rounds scales to a network's type, but never to 0, which TensorRT rejects.

    If a scale is 0 or too small for the type, its weights are 0 or too small as well. Scales that
    turn the grid around are negative and stay so.
    """
    smallest = np.float32(2.0**-24 if dtype == np.float16 else 2.0**-126)
    is_small = np.abs(scales) < smallest
    return convert(np.where(is_small, np.copysign(smallest, scales), scales), dtype)


def _float32(block: NDArray[Any]) -> NDArray[np.float32]:
    return convert(np.ascontiguousarray(block), FLOAT32)
