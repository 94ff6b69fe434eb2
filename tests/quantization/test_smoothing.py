"""The mathematics of SmoothQuant, against its definition in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mpt_trt.errors import MptTrtError
from mpt_trt.quantization.smoothing import (
    int8_scales,
    quantized,
    require_alpha,
    smoothed_norm,
    smoothed_weight,
    smoothing_factors,
)

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Twice the relative error of rounding once.
ROUNDING = {FLOAT32: 2.0**-23, FLOAT16: 2.0**-10, BFLOAT16: 2.0**-7}
DTYPES = st.sampled_from([FLOAT32, FLOAT16, BFLOAT16])
ALPHAS = st.floats(0, 1)

# Weights as they occur, and columns of zeros.
ENTRIES = st.just(0.0) | st.floats(2.0**-10, 4, width=32) | st.floats(-4, -(2.0**-10), width=32)
MAGNITUDES = st.floats(2.0**-7, 64, width=32)


@st.composite
def layers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A weight `[in, out]` and the range of its inputs `[in]`, float32."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    weight = draw(arrays.arrays(np.float32, shape, elements=ENTRIES))
    return weight, draw(arrays.arrays(np.float32, shape[:1], elements=MAGNITUDES))


def factors_of(weight: np.ndarray, input_amax: np.ndarray, alpha: float) -> np.ndarray:
    maxima = np.abs(weight.astype(np.float32)).max(axis=1)
    return smoothing_factors(input_amax, maxima, alpha, weight.dtype)


class TestSmoothing:
    @given(layers(), ALPHAS, st.integers(0, 2**32 - 1))
    def test_the_product_stays(self, layer, alpha: float, seed: int) -> None:
        weight, input_amax = layer
        factors = factors_of(weight, input_amax, alpha)
        x = np.random.default_rng(seed).uniform(-1, 1, (3, len(weight))) * input_amax
        smoothed = (x / factors) @ (weight.astype(np.float64) * factors[:, None])
        np.testing.assert_allclose(smoothed, x @ weight.astype(np.float64), atol=1e-10)

    @given(layers(), ALPHAS, DTYPES)
    def test_what_is_stored_is_the_product_rounded(self, layer, alpha: float, dtype) -> None:
        weight = layer[0].astype(dtype)
        factors = factors_of(weight, layer[1], alpha)
        found = smoothed_weight(weight, factors)
        assert found.dtype == dtype
        exact = weight.astype(np.float64) * factors[:, None]
        rounding = ROUNDING[dtype]
        np.testing.assert_allclose(found.astype(np.float64), exact, rtol=rounding, atol=2.0**-24)

    @given(arrays.arrays(np.float32, 7, elements=ENTRIES), DTYPES)
    def test_norms_are_divided(self, values, dtype) -> None:
        factors = np.array([1e-5, 0.01, 0.3, 1, 3.7, 100, 1e4])
        stored = np.where(factors < 0.01, 0, values).astype(dtype)
        found = smoothed_norm(stored, factors)
        assert found.dtype == dtype
        exact = stored.astype(np.float64) / factors
        np.testing.assert_allclose(
            found.astype(np.float64), exact, rtol=ROUNDING[dtype], atol=2.0**-24
        )

    @given(layers(), ALPHAS, DTYPES)
    def test_factors(self, layer, alpha: float, dtype) -> None:
        weight, input_amax = layer[0].astype(dtype), layer[1]
        largest = np.abs(weight.astype(np.float64)).max(axis=1)
        has_weights = largest > 0
        found = factors_of(weight, input_amax, alpha)[has_weights]
        expected = input_amax[has_weights].astype(np.float64) ** alpha
        expected /= largest[has_weights] ** (1 - alpha)
        rounding = 2.0**-10 if dtype == FLOAT16 else 1e-6
        np.testing.assert_allclose(found, np.maximum(1e-5, expected), rtol=rounding)

    @given(layers())
    def test_extremes_of_alpha(self, layer) -> None:
        """At 1, weights absorb all of the activations' range; at 0, all get the same."""
        weight, input_amax = layer
        np.testing.assert_allclose(factors_of(weight, input_amax, 1), input_amax, rtol=1e-6)
        factors = factors_of(weight, input_amax, 0)
        rows = np.abs(weight).max(axis=1) > 0
        smoothed = np.abs(smoothed_weight(weight, factors)).max(axis=1)[rows]
        np.testing.assert_allclose(smoothed, 1, rtol=1e-6)

    @pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
    @pytest.mark.parametrize("alpha", [0, 0.5, 1])
    def test_dead_features(self, dtype, alpha: float) -> None:
        """An input that is always 0, weights that are all 0, and both."""
        weight = np.array([[1, 2], [0, 0], [0, 0]], dtype)
        found = factors_of(weight, np.array([0, 3, 0], np.float32), alpha)
        assert np.isfinite(found).all()
        assert (found > 0).all()
        assert np.isfinite(smoothed_weight(weight, found).astype(np.float32)).all()

    @pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), float("inf")])
    def test_alpha_out_of_range(self, alpha: float) -> None:
        with pytest.raises(MptTrtError, match=r"^smoothquant = .* within 0 .* and 1"):
            require_alpha(alpha)


def scales_of(weight: np.ndarray, parts: list[int] | None = None):
    maxima = np.abs(weight.astype(np.float32)).max(axis=0)
    return int8_scales(maxima, parts or [weight.shape[1]], 3.0, 5.0, weight.dtype)


class TestQuantization:
    @given(layers(), DTYPES)
    def test_integers_stand_for_their_weights(self, layer, dtype) -> None:
        weight = layer[0].astype(dtype)
        scales = scales_of(weight)
        for by, back in (
            (scales.w_orig_quant, scales.w_quant_orig),
            (scales.w_orig_quant_col, scales.w_quant_orig_col),
        ):
            found = quantized(weight, by)
            assert found.dtype == np.int8
            assert np.abs(found.astype(int)).max() <= 127
            # Half a step, and what rounding scale and product to float16 adds to 127 steps.
            error = np.abs(found * back.astype(np.float64) - weight.astype(np.float64))
            assert (error <= back * (0.5 + (0.2 if dtype == FLOAT16 else 1e-4))).all()

    @given(layers())
    def test_largest_weights_take_the_largest_integers(self, layer) -> None:
        weight = layer[0]
        scales = scales_of(weight)
        largest = np.abs(quantized(weight, scales.w_orig_quant_col).astype(int)).max(axis=0)
        assert set(largest[np.abs(weight).max(axis=0) > 0]) <= {127}

    def test_ties_go_to_even(self) -> None:
        weight = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -130]], np.float32)
        found = quantized(weight, np.ones(8, np.float32))
        assert found.tolist() == [[0, 2, 2, 0, -2, 126, 127, -127]]

    @given(layers(), st.sampled_from([(FLOAT32, 1e-6), (FLOAT16, 1e-3), (BFLOAT16, 1e-6)]))
    def test_scales(self, layer, type_and_tolerance) -> None:
        dtype, tolerance = type_and_tolerance
        weight = layer[0].astype(dtype)
        found = scales_of(weight)
        assert found.x_orig_quant == 127 / 3
        assert found.y_quant_orig == 5 / 127
        of_columns = np.maximum(np.abs(weight.astype(np.float64)).max(axis=0), 1e-8)
        of_all = np.full_like(of_columns, of_columns.max())
        for largest, by, back, accumulated in (
            (of_all, found.w_orig_quant, found.w_quant_orig, found.y_accum_quant),
            (of_columns, found.w_orig_quant_col, found.w_quant_orig_col, found.y_accum_quant_col),
        ):
            assert {by.dtype, back.dtype, accumulated.dtype} == {FLOAT32}
            np.testing.assert_allclose(by, 127 / largest, rtol=tolerance)
            np.testing.assert_allclose(back, largest / 127, rtol=tolerance)
            # An integer sum counts in steps of 3 / 127 times the weight's; 127 stands for output 5.
            expected = (largest / 127) * (3 / 127) * (127 / 5)
            np.testing.assert_allclose(accumulated, expected, rtol=tolerance)

    @given(layers(), DTYPES, st.data())
    def test_parts_are_as_if_alone(self, layer, dtype, data) -> None:
        """Q, K and V have a scale each, and no other than they would have as matrices."""
        weight = layer[0].astype(dtype)
        width = weight.shape[1]
        cuts = sorted(data.draw(st.sets(st.integers(1, width - 1)))) if width > 1 else []
        parts = np.diff([0, *cuts, width]).tolist()
        found = scales_of(weight, parts)
        alone = [scales_of(part) for part in np.split(weight, cuts, axis=1)]
        for name in ("w_orig_quant", "w_quant_orig", "y_accum_quant", "w_orig_quant_col"):
            expected = np.concatenate([getattr(each, name) for each in alone])
            np.testing.assert_array_equal(getattr(found, name), expected)

    @pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
    def test_zeros(self, dtype) -> None:
        weight = np.array([[0, 1], [0, -3]], dtype)
        found = scales_of(weight)
        assert quantized(weight, found.w_orig_quant_col).tolist() == [[0, 42], [0, -127]]
        for values in (found.w_orig_quant_col, found.w_quant_orig_col, found.y_accum_quant_col):
            assert np.isfinite(values).all()
            assert (values > 0).all()

    def test_small_weights_of_float16(self) -> None:
        """127 / 1e-4 is beyond float16; float16's own arithmetic would make these integers 127."""
        weight = np.array([[1e-4, 2e-3], [-5e-5, 1e-3]], np.float16)
        found = scales_of(weight)
        assert quantized(weight, found.w_orig_quant_col).tolist() == [[127, 127], [-64, 64]]
        largest = np.abs(weight.astype(np.float64)).max(axis=0)
        np.testing.assert_allclose(found.w_quant_orig_col, largest / 127, rtol=1e-3)

    def test_silent_layers(self) -> None:
        """Ranges of zero, of a layer that no calibration sample reached."""
        found = int8_scales(np.ones(2, np.float32), [2], 0.0, 0.0, FLOAT32)
        assert np.isfinite([found.x_orig_quant, found.y_quant_orig, *found.y_accum_quant]).all()
