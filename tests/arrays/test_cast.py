"""Rounding, transposing and checking of weights, against PyTorch and NumPy."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mpt_trt.arrays.cast import (
    EXPONENTS,
    KERNELS,
    STORAGE_TYPES,
    TWO_STEP_VALUES,
    conversion,
    convert,
    is_finite,
    transposed_copy,
    transposition,
)
from support.checkpoints import as_numpy
from tools.kernels import kernels

TYPES = {
    "float16": (np.dtype(np.float16), torch.float16),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), torch.bfloat16),
    "float32": (np.dtype(np.float32), torch.float32),
    "float64": (np.dtype(np.float64), torch.float64),
}
FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("source", list(TYPES))
@given(values=st.lists(FINITE, min_size=1, max_size=50))
def test_rounding_is_pytorchs(source: str, target: str, values: list[float]) -> None:
    stored = torch.tensor(values, dtype=torch.float32).to(TYPES[source][1])
    stored = torch.where(stored.isfinite(), stored, torch.zeros_like(stored))
    found = convert(as_numpy(stored), TYPES[target][0])
    expected = as_numpy(stored.to(TYPES[target][1]))
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


def test_every_float16_becomes_the_right_bfloat16() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16)[np.isfinite(bits.view(np.float16))]
    expected = as_numpy(torch.from_numpy(values.copy()).to(torch.bfloat16))
    assert np.array_equal(
        convert(values, TYPES["bfloat16"][0]).view(np.uint16), expected.view(np.uint16)
    )


def test_ties_of_bfloat16_go_to_even_and_the_largest_overflow() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF], np.uint32)
    found = convert(bits.view(np.float32), TYPES["bfloat16"][0]).view(np.uint16)
    assert found.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80]


def test_kernels_are_those_that_the_tool_makes() -> None:
    made = {f"{name}.onnx": model for name, model in kernels()}
    stored = {path.name: onnx.load(path) for path in KERNELS.iterdir()}
    assert stored == made


@pytest.mark.parametrize("name", list(TYPES))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found(name: str, value: float) -> None:
    values = np.ones((5, 7), TYPES[name][0])
    assert is_finite(values)
    values[3, 6] = value
    assert not is_finite(values)


@pytest.mark.parametrize("name", list(TYPES))
def test_extremes_are_finite(name: str) -> None:
    dtype = TYPES[name][0]
    info = ml_dtypes.finfo(dtype)
    assert is_finite(np.array([info.max, info.min, info.smallest_subnormal, 0, -0.0], dtype))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
@given(data=st.data())
def test_transposed_is_transposed(dtype: type, data: st.DataObject) -> None:
    block = data.draw(arrays(dtype, array_shapes(min_dims=2, max_dims=2, max_side=70)))
    target = transposed_copy(block)
    assert target.dtype == dtype
    assert np.array_equal(target, block.T)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_several_blocks_are_transposed_one_by_one(dtype: type) -> None:
    blocks = np.arange(3 * 33 * 70, dtype=dtype).reshape(3, 33, 70)
    targets = np.empty((3, 70, 33), dtype)
    transposition(blocks, targets)()
    assert np.array_equal(targets, blocks.transpose(0, 2, 1))


@pytest.mark.parametrize(
    ("source", "target"),
    [(source, target) for source in TYPES for target in list(TYPES)[:3] if source != target],
)
def test_a_conversion_takes_what_its_source_holds_by_then(source: str, target: str) -> None:
    size = TWO_STEP_VALUES * 2 + 5
    values, found = np.zeros(size, TYPES[source][0]), np.empty(size, TYPES[target][0])
    convert_again = conversion(values, found)
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(3)) * 1e-4
    values[:] = as_numpy(drawn.to(TYPES[source][1]))
    convert_again()
    expected = as_numpy(drawn.to(TYPES[source][1]).to(TYPES[target][1]))
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32"])
def test_what_is_not_finite_is_not_finite_in_any_type(source: str, target: str) -> None:
    """NaNs of all kinds: with rounding, the largest would become zeros if taken for numbers."""
    dtype = STORAGE_TYPES[source]
    exponent = EXPONENTS[dtype]
    below = np.arange(1 << 7, dtype=exponent.dtype)
    bits = np.concatenate([exponent | below, ~exponent.dtype.type(0) - below])
    for value in bits.view(dtype).reshape(-1, 8):
        assert not np.isfinite(convert(value, STORAGE_TYPES[target]).astype(np.float32)).any()
