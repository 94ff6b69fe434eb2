"""Symmetric integer quantization of matrices, in blocks of rows: pure functions of NumPy arrays.

Matrices are `[in_features, out_features]`, as FT stores them and a MatMul wants them. They may be
memory-mapped and in any float type; work is done in float32, on some rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import convert

FLOAT32 = np.dtype(np.float32)
# Elements of a block: few enough for its temporaries to stay in the processor's cache.
BLOCK_ELEMENTS = 1 << 18
# The lower half of each byte of a word.
LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
# The bits of the largest float32 below 0.5, and of the sign.
BELOW_HALF, SIGN = np.uint32(0x3EFFFFFF), np.uint32(0x80000000)


def row_blocks(matrix: NDArray, multiple: int = 1) -> Iterator[NDArray]:
    """Successive rows of a matrix, as many multiples of `multiple` at a time as a block holds."""
    step = max(1, BLOCK_ELEMENTS // (matrix.shape[1] * multiple)) * multiple
    for start in range(0, len(matrix), step):
        yield matrix[start : start + step]


def column_amax(matrix: NDArray) -> NDArray[np.float32]:
    """Largest magnitude of each column, float32 `[out_features]`."""
    found = np.zeros(matrix.shape[1], np.float32)
    for block in row_blocks(matrix):
        # Without their sign, bits are in the order of magnitudes.
        bits = np.ascontiguousarray(block).view(f"u{block.itemsize}")
        largest = (bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)).max(axis=0)
        np.maximum(found, _float32(largest.view(matrix.dtype)), out=found)
    return found


def group_amax(matrix: NDArray, group_size: int) -> NDArray[np.float32]:
    """Largest magnitude of each group of rows in each column.

    float32 `[in_features / group_size, out_features]`.
    """
    starts = range(0, len(matrix), group_size)
    return np.stack([column_amax(matrix[start : start + group_size]) for start in starts])


def quantize(matrix: NDArray, scales: NDArray[np.float32], bits: int) -> Iterator[NDArray[np.int8]]:
    """Blocks of rows of round(matrix / scale), clipped to the signed range of `bits` bits.

    scales: float32 `[groups, out_features]`, each for in_features / groups rows; columns of zeros
    may have scale 0. Halves are rounded away from zero (ft_checkpoint, section 5). All blocks but
    the last have an even number of rows, where groups have.
    """
    limit = 1 << (bits - 1)
    nonzero = np.where(scales == 0, np.float32(1), scales)
    group_size = len(matrix) // len(scales)
    for group, scale in enumerate(nonzero):
        rows = matrix[group * group_size :][:group_size]
        for block in row_blocks(rows, 2):
            shifted = _past_halves(_float32(block) / scale)
            # The conversion cuts off what is behind the point.
            yield np.clip(shifted, -limit, limit - 1, out=shifted).astype(np.int8)


def _past_halves(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """`values` moved away from zero so that, cut off, they are rounded, halves away from zero.

    By the largest number below a half: what is just below a half must not get to the next integer.
    """
    moves = values.view(np.uint32) & SIGN
    moves |= BELOW_HALF
    found = moves.view(np.float32)
    return np.add(found, values, out=found)


def packed(blocks: Iterator[NDArray[np.int8]]) -> Iterator[NDArray[np.uint8]]:
    """`pack_int4` of a matrix in blocks, all but the last of an even number of rows."""
    return map(pack_int4, blocks)


def pack_int4(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two values a byte along the flattened array, the even one in the low nibble.

    The layout of ONNX's INT4 and of FT's weight-only files; of an odd number of values, the last
    high nibble is 0.
    """
    flat = values.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    pairs = flat.view("<u2")
    high = (pairs >> np.uint16(4)) & np.uint16(0xF0)
    return ((pairs & np.uint16(0xF)) | high).astype(np.uint8)


def pack_int4_rows(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two values a byte down each column, of an even number of rows: the even row's is low.

    The transpose is `pack_int4` of the transposed values.
    """
    # Eight bytes at a time where rows are whole words: a shift of masked nibbles stays in its byte.
    is_of_words = values.flags.c_contiguous and values.shape[1] % 8 == 0
    nibbles = values.view(np.uint64 if is_of_words else np.uint8)
    low = nibbles.dtype.type(LOW_NIBBLES & np.iinfo(nibbles.dtype).max)
    pairs = nibbles[0::2] & low
    pairs |= (nibbles[1::2] & low) << nibbles.dtype.type(4)
    return pairs.view(np.uint8)


def stored_scales(scales: NDArray[np.float32], dtype: np.dtype) -> NDArray:
    """Scales in a network's type, none of them 0, which TensorRT refuses.

    Where a scale was 0, or is too small for the type, the weights are 0 or vanish with it.
    """
    smallest = np.float32(2.0**-24 if dtype == np.float16 else 2.0**-126)
    return convert(np.maximum(scales, smallest), dtype)


def _float32(block: NDArray) -> NDArray[np.float32]:
    return convert(np.ascontiguousarray(block), FLOAT32)
