"""The embedding and the head in 8 bits, with one scale per vocabulary row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES, convert
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.joined_tensors import FtTensors
from mpt_trt.model.sharding import Range, Rank, vocabulary_rows, vocabulary_width
from mpt_trt.model.tensors import Weight, vocabulary_tables
from mpt_trt.network.graph import StoredTensor
from mpt_trt.network.linear.base import computed
from mpt_trt.network.linear.specs import TensorSpec
from mpt_trt.quantization.integers import FLOAT32, row_blocks, stored_scales

LARGEST = 127


def integers_name(table: str, is_part: bool) -> str:
    """Name of a table's integers: those of all rows, or of the rank's part."""
    return f"{table}.part.int8" if is_part else f"{table}.int8"


def scale_name(table: str, is_part: bool) -> str:
    """Name of the scales of `integers_name`."""
    return f"{integers_name(table, is_part)}_scale"


def int8_tables(checkpoint: FtCheckpoint, rank: Rank) -> dict[str, StoredTensor]:
    """Tables of a rank by name: int8 `[rows, hidden]` and scales `[rows]` of each table.

    Each table has all rows, and the rank's part, which is padded with zeros to the width of all
    parts. The network stores those that it reads.
    """
    config, dtype = checkpoint.config, checkpoint.storage_type
    tensors: dict[str, StoredTensor] = {}
    every, part = Range(0, config.vocab_size), vocabulary_rows(config, rank)
    width = vocabulary_width(config, rank.tp_size)
    for weight in vocabulary_tables(config):
        table = weight.name.removesuffix(".weight")
        for rows, height, is_part in ((every, config.vocab_size, False), (part, width, True)):
            suffix = f".{rank.index}" if is_part else ""
            integers, scale = integers_name(table, is_part), scale_name(table, is_part)
            tensors[integers] = computed(
                f"{integers}{suffix}",
                TensorSpec("int8", (height, config.hidden_size)),
                partial(_integers, checkpoint, weight, rows, height),
            )
            tensors[scale] = computed(
                f"{scale}{suffix}",
                TensorSpec(dtype, (height,)),
                partial(_scales, checkpoint, weight, rows, height),
            )
    return tensors


def _integers(
    checkpoint: FtCheckpoint, weight: Weight, rows: Range, height: int
) -> Iterator[NDArray[np.int8]]:
    """Yields round(row / scale), half to even."""
    for block, scales in _blocks(checkpoint, weight, rows):
        quotient = block / convert(scales, FLOAT32)[:, None]
        yield np.rint(quotient).clip(-LARGEST, LARGEST).astype(np.int8)
    yield np.zeros((height - len(rows), weight.shape[1]), np.int8)


def _scales(
    checkpoint: FtCheckpoint, weight: Weight, rows: Range, height: int
) -> Iterator[NDArray]:
    dtype = STORAGE_TYPES[checkpoint.storage_type]
    for _, scales in _blocks(checkpoint, weight, rows):
        yield scales
    yield stored_scales(np.zeros(height - len(rows), np.float32), dtype)


def _blocks(
    checkpoint: FtCheckpoint, weight: Weight, rows: Range
) -> Iterator[tuple[NDArray[np.float32], NDArray]]:
    """Yields some rows in float32 with their scales, amax / 127, in the network's type."""
    dtype = STORAGE_TYPES[checkpoint.storage_type]
    for stored in row_blocks(FtTensors(checkpoint).tensor(weight)[rows.start : rows.stop]):
        block = convert(np.ascontiguousarray(stored), FLOAT32)
        amax = np.abs(block).max(axis=1)
        yield block, stored_scales(amax / np.float32(LARGEST), dtype)
