"""Reads a rank's part of a calibrated matrix in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mpt_trt.calibration.result import CalibrationResult
from mpt_trt.model.sharding import Range
from mpt_trt.model.tensors import BlockMatrix

# One cache line of each column's packed 4-bit integers.
BLOCK_ROWS = 128


def held_blocks(
    calibration: CalibrationResult,
    layer: int,
    matrix: BlockMatrix,
    rows: list[Range],
    columns: Range,
) -> Iterator[tuple[NDArray, NDArray[np.float32]]]:
    """Yields a rank's part of a matrix, BLOCK_ROWS rows at a time, with the rows' scales.

    rows: in ascending order. Each block `[BLOCK_ROWS, columns]` is valid until the next one is
    requested; its scales are float32 `[BLOCK_ROWS, columns / group_size]`.

    Raises MptTrtError when the result is not one of a format in groups.
    """
    group_size = calibration.integer_format(layer, matrix).group_size
    assert group_size is not None, "int8 has no groups"
    groups = slice(columns.start // group_size, columns.stop // group_size)
    whole = calibration.group_scales(layer, matrix)
    scales = np.concatenate([whole[part.start : part.stop, groups] for part in rows])
    parts = _held_parts(calibration.grouped_rows(layer, matrix, BLOCK_ROWS), rows, columns)
    start = 0
    for block in _joined(parts, BLOCK_ROWS):
        yield block, scales[start : start + len(block)]
        start += len(block)


def _held_parts(blocks: Iterator[NDArray], rows: list[Range], columns: Range) -> Iterator[NDArray]:
    """Yields a rank's part of successive blocks of a matrix. rows: in ascending order."""
    start = 0
    for block in blocks:
        for part in rows:
            held_rows = block[max(part.start - start, 0) : max(part.stop - start, 0)]
            yield held_rows[:, columns.start : columns.stop]
        start += len(block)


def _joined(parts: Iterator[NDArray], number: int) -> Iterator[NDArray]:
    """Yields the same rows, `number` at a time, copied to a reused block if necessary."""
    block, filled = np.empty((0, 0)), 0
    for part in parts:
        rest = part
        if not filled and len(rest) == number:
            yield rest
            continue
        while len(rest):
            if not block.size:
                block = np.empty((number, rest.shape[1]), rest.dtype)
            taken = rest[: number - filled]
            np.copyto(block[filled : filled + len(taken)], taken, casting="safe")
            filled, rest = filled + len(taken), rest[len(taken) :]
            if filled == number:
                yield block
                filled = 0
    if filled:
        yield block[:filled]
