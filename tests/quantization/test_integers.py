"""Symmetric integers against their published formulas, written out element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.quantization import integers


def rounded(value: float) -> int:
    """Nearest integer, halves away from zero."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def expected_integers(matrix: NDArray, bits: int, group_size: int) -> tuple[NDArray, NDArray]:
    """Integers `[in, out]` and unrounded scales `[in / group_size, out]` (format, section 5)."""
    height, width = matrix.shape
    half = 2 ** (bits - 1)
    found = np.zeros((height, width), np.int64)
    scales = np.zeros((height // group_size, width), np.float32)
    for group in range(height // group_size):
        rows = range(group * group_size, (group + 1) * group_size)
        for column in range(width):
            largest = max(abs(np.float32(matrix[row, column])) for row in rows)
            scale = np.float32(largest / np.float32(half))
            scales[group, column] = scale
            for row in rows:
                quotient = np.float32(matrix[row, column]) / scale if scale else 0.0
                found[row, column] = min(max(rounded(float(quotient)), -half), half - 1)
    return found, scales


def nibbles(packed: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.int64]:
    """4-bit integers, the even one of each pair in the low half of a byte."""
    flat = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1).astype(np.int64)
    signed = np.where(flat > 7, flat - 16, flat)
    return signed[: math.prod(shape)].reshape(shape)


matrices = st.tuples(
    st.integers(1, 5), st.integers(1, 9), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1)
)


@given(matrices, st.booleans())
def test_integers_are_those_of_the_formula(case: tuple[int, int, int, int], by_group: bool) -> None:
    groups, width, bits, seed = case
    random = np.random.default_rng(seed)
    height = 16 * groups
    # Multiples of a sixteenth of the largest, so that halves are met; some columns of zeros.
    matrix = random.integers(-16, 17, (height, width)).astype(np.float16) / 16
    matrix[:, random.random(width) < 0.2] = 0
    group_size = 16 if by_group else height
    expected, scales = expected_integers(matrix, bits, group_size)
    amax = integers.group_amax(matrix, 16) if by_group else integers.column_amax(matrix)[None]
    found_scales = amax / np.float32(2 ** (bits - 1))
    np.testing.assert_array_equal(found_scales, scales)
    found = np.concatenate(list(integers.quantize(matrix, found_scales, bits)))
    np.testing.assert_array_equal(found, expected)
    if bits == 4:
        packed = np.concatenate(list(integers.packed(iter([found]))))
        np.testing.assert_array_equal(nibbles(packed, found.shape), expected)


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_pairs_of_rows_pack_as_their_transpose(pairs: int, width: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(-8, 8, (2 * pairs, width), np.int8)
    transposed = np.ascontiguousarray(values.T)
    found = integers.pack_int4_rows(values).T.reshape(-1)
    np.testing.assert_array_equal(found, integers.pack_int4(transposed))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_amax(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal((96, 10), np.float32)
    matrix = values.astype(STORAGE_TYPES[dtype])
    exact = np.abs(matrix.astype(np.float32))
    np.testing.assert_array_equal(integers.column_amax(matrix), exact.max(0))
    by_group = exact.reshape(6, 16, 10).max(1)
    np.testing.assert_array_equal(integers.group_amax(matrix, 16), by_group)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_blocks_of_rows_pack_as_the_whole(height: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(-8, 8, (2 * height + 1, width), np.int8)
    cuts = sorted({2 * int(i) for i in random.integers(0, height + 1, 3)})
    blocks = np.split(values, cuts)
    found = np.concatenate(list(integers.packed(iter(blocks))))
    np.testing.assert_array_equal(found, integers.pack_int4(values))
    np.testing.assert_array_equal(nibbles(found, values.shape), values)


@given(st.floats(-126, 126, width=32))
def test_halves_are_rounded_away_from_zero(value: float) -> None:
    for exact in (value, math.trunc(value) + math.copysign(0.5, value)):
        assert rounded_by_quantize([exact]) == [rounded(float(np.float32(exact)))]


def test_the_largest_number_below_a_half_is_rounded_down() -> None:
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    assert rounded_by_quantize([below, -below, 0.5, -0.5]) == [0, 0, 1, -1]


def rounded_by_quantize(values: list[float]) -> list[int]:
    row = np.array([values], np.float32)
    (block,) = integers.quantize(row, np.ones_like(row), 8)
    return block[0].tolist()


def test_many_blocks_are_quantized_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(0).standard_normal((96, 10), np.float32)
    scales = integers.group_amax(matrix, 16) / np.float32(8)
    whole = np.concatenate(list(integers.quantize(matrix, scales, 4)))
    by_column = integers.column_amax(matrix)[None] / np.float32(128)
    whole_by_column = np.concatenate(list(integers.quantize(matrix, by_column, 8)))
    monkeypatch.setattr(integers, "BLOCK_ELEMENTS", 150)
    blocks = list(integers.quantize(matrix, scales, 4))
    assert len(blocks) > 6 and all(len(block) % 2 == 0 for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    blocks = list(integers.quantize(matrix, by_column, 8))
    assert len(blocks) > 6 and all(len(block) % 2 == 0 for block in blocks[:-1])
    np.testing.assert_array_equal(np.concatenate(blocks), whole_by_column)
    np.testing.assert_array_equal(integers.group_amax(matrix, 16) / np.float32(8), scales)
