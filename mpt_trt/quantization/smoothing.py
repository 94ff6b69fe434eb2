"""SmoothQuant (Xiao et al., arXiv:2211.10438) as NVIDIA's converter computes it: pure functions.

A linear layer computes the same if each input feature is divided by a factor s and its weights are
multiplied by it. The factors shift amax from the activations, which are hard to quantize, to the
weights. If a norm precedes the layer, its weight and bias absorb the division; otherwise the
network divides by the smoother at run time.

Everything is computed on the whole matrix, before it is split among ranks, so every tensor-parallel
size gets the same integers and scales. The arithmetic reproduces the bytes of NVIDIA's converter,
except where that is wrong (docs/ft_differences.md).

A layer's weight is `[in_features, out_features]` here, as FT stores it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import convert
from mpt_trt.errors import MptTrtError

LARGEST = 127
"""Integers are symmetric: -128 is not used."""
# Lower bound of smoothing factors, and of the weight amax that they are computed from.
SMALLEST_FACTOR = 1e-5
# Replaces the amax of zeros, which would have no scale; below any real amax.
SMALLEST_AMAX = 1e-8

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)


def require_alpha(alpha: float) -> None:
    """Raises MptTrtError when alpha is not within 0 to 1."""
    if not 0 <= alpha <= 1:
        raise MptTrtError(
            f"smoothquant = {alpha:g}: alpha must be within 0 (all range stays in the activations) "
            "and 1 (all goes to the weights)"
        )


def smoothing_factors(
    input_amax: NDArray[np.float32],
    weight_amax: NDArray[np.float32],
    alpha: float,
    dtype: np.dtype[Any],
) -> NDArray[np.float64]:
    """Computes s[k] = max(1e-5, x[k]^alpha / w[k]^(1 - alpha)), `[in_features]`.

    input_amax: x, amax of each input feature. weight_amax: w, amax of each input feature's weights.
    dtype: type of the weights.
    """
    # float32 powers are PyTorch's, as in the original, because NumPy's differ in the last place.
    # Imported here because plain conversions and networks of smoothed weights do not need PyTorch.
    import torch

    of_weights = np.maximum(weight_amax, np.float32(SMALLEST_FACTOR))
    power = torch.from_numpy(of_weights).pow(1 - alpha).numpy()
    if dtype == FLOAT16:
        power = _in_float16(power)
    of_activations = input_amax.astype(np.float64) ** alpha
    factors: NDArray[np.float64] = np.maximum(SMALLEST_FACTOR, of_activations / power)
    return factors


def smoothed_weight(weight: NDArray[Any], factors: NDArray[np.float64]) -> NDArray[Any]:
    """Multiplies rows of a weight `[rows, out]` by their factors `[rows]`, in the weight's type."""
    product = convert(weight, FLOAT32) * factors[:, None]
    return convert(product.astype(np.float32), weight.dtype)


def smoothed_norm(values: NDArray[Any], factors: NDArray[np.float64]) -> NDArray[Any]:
    """Divides a norm's weight or bias `[in_features]` by the factors, in its own type."""
    quotient = convert(values, FLOAT32) / factors
    with np.errstate(over="ignore"):
        return convert(quotient.astype(np.float32), values.dtype)


def quantized(weight: NDArray[Any], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """Multiplies `[rows, out]` by the scales `[out]` and rounds to nearest even, -127 to 127."""
    product = convert(weight, FLOAT32) * scales
    if weight.dtype == FLOAT16:
        product = product.astype(np.float16).astype(np.float32)
    return np.rint(product).clip(-LARGEST, LARGEST).astype(np.int8)


@dataclass(frozen=True)
class Int8Scales:
    """Scales of one layer's whole matrix, with FT's names.

    Arrays, float32 `[out_features]`. w_orig_quant: factor that quantizes the weights of an output
    feature, one value per matrix (one each for Q, K and V). w_orig_quant_col: likewise, one value
    per output feature. w_quant_orig(_col): their reciprocals. y_accum_quant(_col): factor from an
    integer sum of products to a quantized output.

    Numbers. x_orig_quant: factor from input to integer. y_quant_orig: from integer to output.
    """

    w_orig_quant: NDArray[np.float32]
    w_orig_quant_col: NDArray[np.float32]
    w_quant_orig: NDArray[np.float32]
    w_quant_orig_col: NDArray[np.float32]
    y_accum_quant: NDArray[np.float32]
    y_accum_quant_col: NDArray[np.float32]
    x_orig_quant: float
    y_quant_orig: float


def int8_scales(
    weight_amax: NDArray[np.float32],
    parts: Sequence[int],
    input_amax: float,
    output_amax: float,
    dtype: np.dtype[Any],
) -> Int8Scales:
    """Computes all scales of a layer.

    weight_amax: amax of each output feature's weights, `[out_features]`. parts: numbers of output
    features that share a weight scale per tensor. input_amax: amax of the layer's input, after
    smoothing, if any. output_amax: amax of its output. dtype: type of the weights.
    """
    nonzero_amax = np.maximum(weight_amax, np.float32(SMALLEST_AMAX))
    by_column = _rounded(np.divide(np.float32(LARGEST), nonzero_amax), dtype)
    ends = np.cumsum(parts)[:-1]
    # The largest weight has the smallest scale.
    by_part = np.concatenate([np.full_like(part, part.min()) for part in np.split(by_column, ends)])
    input_amax = max(input_amax, SMALLEST_AMAX)
    output_amax = max(output_amax, SMALLEST_AMAX)
    x_orig_quant, y_orig_quant = LARGEST / input_amax, LARGEST / output_amax

    def accumulated(scales: NDArray[np.float32]) -> NDArray[np.float32]:
        return (y_orig_quant / (x_orig_quant * scales.astype(np.float64))).astype(np.float32)

    def inverse(scales: NDArray[np.float32]) -> NDArray[np.float32]:
        return _rounded(np.float32(1) / scales, dtype)

    return Int8Scales(
        w_orig_quant=by_part,
        w_orig_quant_col=by_column,
        w_quant_orig=inverse(by_part),
        w_quant_orig_col=inverse(by_column),
        y_accum_quant=accumulated(by_part),
        y_accum_quant_col=accumulated(by_column),
        x_orig_quant=x_orig_quant,
        y_quant_orig=output_amax / LARGEST,
    )


def _rounded(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[np.float32]:
    """Rounds scales like the original: to float16 for weights in float16.

    Scales outside float16's normal range stay as they are; the original gets infinities, zeros and
    denormal numbers there.
    """
    if dtype != FLOAT16:
        return values
    is_normal = (values >= np.finfo(np.float16).tiny) & (values <= np.finfo(np.float16).max)
    return np.where(is_normal, _in_float16(values), values)


def _in_float16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)
