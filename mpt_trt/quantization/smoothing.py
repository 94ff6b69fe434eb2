"""SmoothQuant (Xiao et al., arXiv:2211.10438) as NVIDIA's converter computes it: pure functions.

A linear layer computes the same when its input is divided by a factor s for each input feature and
its weight is multiplied by it. The factors shift range from the activations, which are hard to
quantize, to the weights. Where a norm precedes the layer, its weight and bias take the division;
where none does, the network divides by the smoother at run time.

Everything is computed on the whole matrix, before it is cut for ranks: every number of ranks gets
the same integers and scales. Arithmetic is that of NVIDIA's converter, whose bytes these are; it is
left where it is wrong (docs/ft_differences.md).

A layer's weight here is `[in_features, out_features]`, as FT stores it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import convert
from mpt_trt.errors import MptTrtError

LARGEST = 127
"""Integers are symmetric: -128 is not used."""
# Of smoothing factors, and of the weight maxima that they are computed from.
SMALLEST_FACTOR = 1e-5
# Below any real range: a scale of zeros alone is computed from it.
SMALLEST_RANGE = 1e-8

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)


def require_alpha(alpha: float) -> None:
    """Raises MptTrtError when alpha is not within 0 to 1."""
    if not 0 <= alpha <= 1:
        raise MptTrtError(
            f"smoothquant = {alpha:g}: alpha must be within 0 (all range stays in the activations) "
            "and 1 (all goes to the weights)"
        )


def smoothing_factors(
    input_range: NDArray[np.float32],
    weight_maxima: NDArray[np.float32],
    alpha: float,
    dtype: np.dtype,
) -> NDArray[np.float64]:
    """s[k] = max(1e-5, x[k]^alpha / w[k]^(1 - alpha)), `[in_features]`.

    input_range: largest magnitude of each input feature. weight_maxima: of each input feature's
    weights. dtype: of the weights.
    """
    # float32 powers are PyTorch's, as in the original: they differ from NumPy's in the last place.
    import torch

    of_weights = np.maximum(weight_maxima, np.float32(SMALLEST_FACTOR))
    power = torch.from_numpy(of_weights).pow(1 - alpha).numpy()
    if dtype == FLOAT16:
        power = _in_float16(power)
    of_activations = input_range.astype(np.float64) ** alpha
    return np.maximum(SMALLEST_FACTOR, of_activations / power)


def smoothed_weight(weight: NDArray, factors: NDArray[np.float64]) -> NDArray:
    """Rows of a weight `[rows, out]` times their factors `[rows]`; in the weight's own type."""
    product = convert(weight, FLOAT32) * factors[:, None]
    return convert(product.astype(np.float32), weight.dtype)


def smoothed_norm(values: NDArray, factors: NDArray[np.float64]) -> NDArray:
    """A norm's weight or bias `[in_features]`, divided by the factors; in its own type."""
    quotient = convert(values, FLOAT32) / factors
    with np.errstate(over="ignore"):
        return convert(quotient.astype(np.float32), values.dtype)


def quantized(weight: NDArray, scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """`[rows, out]` times the scales `[out]`, rounded to nearest even, -127 to 127."""
    product = convert(weight, FLOAT32) * scales
    if weight.dtype == FLOAT16:
        product = product.astype(np.float16).astype(np.float32)
    return np.rint(product).clip(-LARGEST, LARGEST).astype(np.int8)


@dataclass(frozen=True)
class Int8Scales:
    """The scales of one layer's whole matrix, by the names that FT has for them.

    w_orig_quant: what the weights of each output feature are multiplied by to quantize them, one
    value a matrix (one each for Q, K and V). w_orig_quant_col: one value an output feature.
    w_quant_orig(_col): their reciprocals. y_accum_quant(_col): from an integer sum of products to a
    quantized output. All float32 `[out_features]`.
    x_orig_quant: from input to integer. y_quant_orig: from integer to output. Numbers.
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
    weight_maxima: NDArray[np.float32],
    parts: Sequence[int],
    largest_input: float,
    largest_output: float,
    dtype: np.dtype,
) -> Int8Scales:
    """All scales of a layer.

    weight_maxima: largest magnitude of each output feature's weights, `[out_features]`. parts:
    numbers of output features that share a weight scale per tensor. dtype: of the weights.
    largest_input: largest magnitude of what the weight is multiplied with, smoothed if it is.
    """
    largest = np.maximum(weight_maxima, np.float32(SMALLEST_RANGE))
    by_column = _rounded(np.float32(LARGEST) / largest, dtype)
    ends = np.cumsum(parts)[:-1]
    # The least scale is that of the largest weight.
    by_part = np.concatenate([np.full_like(part, part.min()) for part in np.split(by_column, ends)])
    largest_input = max(largest_input, SMALLEST_RANGE)
    largest_output = max(largest_output, SMALLEST_RANGE)
    x_orig_quant, y_orig_quant = LARGEST / largest_input, LARGEST / largest_output

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
        y_quant_orig=largest_output / LARGEST,
    )


def _rounded(values: NDArray[np.float32], dtype: np.dtype) -> NDArray[np.float32]:
    """Scales as the original's arithmetic has them: in float16 for weights in float16.

    What float16 holds in part or not at all stays as it is, where the original has infinities,
    zeros and denormal numbers.
    """
    if dtype != FLOAT16:
        return values
    is_normal = (values >= np.finfo(np.float16).tiny) & (values <= np.finfo(np.float16).max)
    return np.where(is_normal, _in_float16(values), values)


def _in_float16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)
