"""Blocks of transposed matrices against NumPy's transpose."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mpt_trt.arrays.cast import BFLOAT16
from mpt_trt.arrays.transpose import Buffers, transposed_blocks

TYPES = [np.dtype(t) for t in (np.float16, BFLOAT16, np.float32, np.float64)]
# Rows of the parts of each file, and columns.
SHAPES = {
    "one tile": ([[200]], 300),
    "one value": ([[1]], 1),
    "one column": ([[513]], 1),
    "one row": ([[1]], 700),
    "several tiles": ([[1024]], 520),
    "several groups": ([[4352]], 263),
    "parts that tiles and groups do not respect": ([[1000, 1500, 1852]], 257),
    "files": ([[512], [512], [512]], 300),
    "files of parts": ([[256, 64, 64], [256, 64, 64]], 640),
    "a prime number of rows": ([[1031], [1031]], 270),
    "few rows, several blocks": ([[2], [2]], 150_001),
}


def joined_blocks(files: list[list[NDArray]], dtype: np.dtype, buffers: Buffers) -> list[NDArray]:
    """Joins the blocks of each file, `[in, out]`."""
    blocks = [block.copy() for block in transposed_blocks(files, dtype, buffers)]
    return list(np.concatenate(blocks, axis=1))


def numbers(shape: tuple[int, int], dtype: np.dtype, seed: int = 0) -> NDArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_transposed(name: str, dtype: np.dtype) -> None:
    sizes, columns = SHAPES[name]
    source = numbers((sum(map(sum, sizes)), columns), dtype)
    files: list[list[NDArray]] = []
    start = 0
    for of_file in sizes:
        files.append([])
        for rows in of_file:
            files[-1].append(source[start : start + rows])
            start += rows
    for found, parts in zip(joined_blocks(files, dtype, Buffers()), files, strict=True):
        assert found.tobytes() == np.concatenate(parts).T.tobytes()


@pytest.mark.parametrize("source", TYPES, ids=str)
@pytest.mark.parametrize("target", TYPES[:3], ids=str)
def test_rounded(source: np.dtype, target: np.dtype) -> None:
    matrix = numbers((640, 333), source)
    (found,) = joined_blocks([[matrix]], target, Buffers())
    expected = matrix.T.astype(target)
    assert found.tobytes() == expected.tobytes()


def test_parts_of_rows_and_rows_that_are_not_contiguous() -> None:
    matrix = numbers((300, 900), np.dtype(np.float32))
    (found,) = joined_blocks([[matrix[:, 100:500]]], matrix.dtype, Buffers())
    assert (found == matrix[:, 100:500].T).all()
    (found,) = joined_blocks([[matrix.T]], matrix.dtype, Buffers())
    assert (found == matrix).all()


def test_buffers_serve_one_matrix_after_the_other() -> None:
    buffers = Buffers()
    for seed, (shape, dtype) in enumerate(
        [((512, 300), TYPES[2]), ((40, 31), TYPES[0]), ((1024, 700), TYPES[1])]
    ):
        matrix = numbers(shape, dtype, seed)
        (found,) = joined_blocks([[matrix]], dtype, buffers)
        assert found.tobytes() == matrix.T.tobytes()
