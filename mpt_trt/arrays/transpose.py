"""Transposes memory-mapped matrices in blocks that stay in the processor's cache.

Columns are gathered and cut into tiles of a few rows, and each tile is transposed on its own: the
kernel reads a few bytes of every row at a time, and the cache lines of a tile's rows stay in the
first-level cache. The transposed tiles are then put side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import conversion, transposition

# Minimum number of bytes gathered from each row at a time.
ROW_BYTES = 512
# Bytes per block. If a matrix has few rows, more bytes of each row are gathered to reach it.
BLOCK_BYTES = 512 << 10
# Maximum number of bytes gathered and transposed at a time.
GROUP_BYTES = 1 << 20
# Maximum number of rows per tile. The minimum is a quarter of it, if the number of rows has such a
# divisor.
TILE_ROWS = 256
# Padding per row: rows of a power of two bytes would compete for a few cache lines.
PADDING_BYTES = 16


class Buffers:
    """Memory that one thread reuses, because new pages take time."""

    def __init__(self) -> None:
        self._memory: dict[str, NDArray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
        """Returns an array with arbitrary content, in the memory of the previous `name`."""
        size = math.prod(shape) * dtype.itemsize
        if name not in self._memory or self._memory[name].nbytes < size:
            self._memory[name] = np.empty(size, np.uint8)
        return self._memory[name][:size].view(dtype).reshape(shape)


def transposed_blocks(
    files: list[list[NDArray]], dtype: np.dtype, buffers: Buffers
) -> Iterator[NDArray]:
    """Yields blocks of columns as rows, `[files, columns, out]`; each overwrites the previous one.

    files: parts `[rows, in]` of each file's matrix, from top to bottom; all files have the same
    shape. dtype: type of the blocks, rounded to as by `convert`.
    """
    length, itemsize = files[0][0].shape[1], files[0][0].itemsize
    width = sum(len(part) for parts in files for part in parts)
    row_bytes = ROW_BYTES * max(1, BLOCK_BYTES // (ROW_BYTES * width))
    height = min(length, row_bytes // itemsize)
    rest = length - length % height
    for columns, step in ((range(rest), height), (range(rest, length), length - rest)):
        if len(columns) > 0:
            yield from _equal_blocks(files, dtype, columns, step, buffers)


def _equal_blocks(
    files: list[list[NDArray]], dtype: np.dtype, columns: range, height: int, buffers: Buffers
) -> Iterator[NDArray]:
    """Yields blocks of `height` columns."""
    width = sum(map(len, files[0]))
    tile = _tile_rows(width)
    padded = height + PADDING_BYTES // dtype.itemsize
    num_tiles = _largest_divisor(width // tile, GROUP_BYTES // (tile * padded * dtype.itemsize))
    gathered = buffers.take("gathered", (num_tiles, tile, padded), files[0][0].dtype)
    gathered[..., height:] = 0
    tiles = buffers.take("tiles", (num_tiles, padded, tile), dtype)
    block = buffers.take("block", (len(files), height, width), dtype)
    transpose = _conversion_and_transposition(gathered, tiles, buffers)
    rows = gathered.reshape(-1, padded)[:, :height]
    transposed = _as_items(tiles[:, :height])
    groups = [
        _Group(sources, transpose, transposed, place)
        for parts, of_file in zip(files, block, strict=True)
        for sources, place in zip(
            _in_groups(parts, rows), _places(of_file, num_tiles, tile), strict=True
        )
    ]
    for start in range(columns.start, columns.stop, height):
        for group in groups:
            group.fill(range(start, start + height))
        yield block


def _conversion_and_transposition(
    gathered: NDArray, tiles: NDArray, buffers: Buffers
) -> Callable[[], None]:
    """Makes a function that fills `tiles` with the transposed `gathered`."""
    if gathered.dtype == tiles.dtype:
        return transposition(gathered, tiles)
    rounded = buffers.take("rounded", gathered.shape, tiles.dtype)
    round_all, transpose = conversion(gathered, rounded), transposition(rounded, tiles)

    def run() -> None:
        round_all()
        transpose()

    return run


@dataclass(frozen=True)
class _Group:
    """Tiles that are gathered and transposed together.

    sources: rows of the matrix, `[rows, in]`, each with its target, `[rows, height]`. tiles: output
    of `transpose`. place: destination of the tiles. Both as items of a tile's rows.
    """

    sources: list[tuple[NDArray, NDArray]]
    transpose: Callable[[], None]
    tiles: NDArray
    place: NDArray

    def fill(self, columns: range) -> None:
        for rows, gathered in self.sources:
            _copy_rows(rows[:, columns.start : columns.stop], gathered)
        self.transpose()
        np.copyto(self.place, self.tiles)


def _in_groups(parts: list[NDArray], rows: NDArray) -> Iterator[list[tuple[NDArray, NDArray]]]:
    """Divides the parts, from top to bottom, into groups with the same number of rows as `rows`."""
    group: list[tuple[NDArray, NDArray]] = []
    filled = 0
    for part in parts:
        start = 0
        while start < len(part):
            taken = min(len(part) - start, len(rows) - filled)
            group.append((part[start : start + taken], rows[filled : filled + taken]))
            start, filled = start + taken, filled + taken
            if filled == len(rows):
                yield group
                group, filled = [], 0


def _places(block: NDArray, num_tiles: int, tile: int) -> Iterator[NDArray]:
    """Yields the place of each group's tiles in `[height, out]`, as items `[tiles, height]`."""
    items = _as_items(block.reshape(len(block), -1, tile)).T
    for start in range(0, len(items), num_tiles):
        yield items[start : start + num_tiles]


def _copy_rows(source: NDArray, target: NDArray) -> None:
    if source.strides[-1] == source.itemsize:
        source, target = _as_items(source), _as_items(target)
    np.copyto(target, source)


def _as_items(values: NDArray) -> NDArray:
    """Views the last axis as one item, which NumPy copies faster than a row of numbers."""
    return values.view(f"V{values.shape[-1] * values.itemsize}")[..., 0]


def _tile_rows(width: int) -> int:
    rows = _largest_divisor(width, TILE_ROWS)
    return rows if rows >= TILE_ROWS // 4 else width


def _largest_divisor(number: int, limit: int) -> int:
    return next(size for size in range(max(1, min(number, limit)), 0, -1) if number % size == 0)
