"""Results of calibration for one matrix, and for the KV cache of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The largest values of the formats: scale = amax / largest value.
INT4_MAX, INT8_MAX, FP8_MAX = 7, 127, 448


@dataclass(frozen=True)
class AwqMatrix:
    """A matrix for 4-bit groups; `x W^T` is `(x * pre_quant_scale) weight^T`.

    weight: `[out, in]`, already divided by pre_quant_scale; float32, or the stored type if it was
    read from a file. scales: float32 `[out, in / group_size]`, amax / 7 of each group; if they were
    chosen by error, they may be negative. pre_quant_scale: float32 `[in]`.
    """

    weight: NDArray[Any]
    scales: NDArray[np.float32]
    pre_quant_scale: NDArray[np.float32]


@dataclass(frozen=True)
class RoundedWeights:
    """A matrix that calibration has rounded itself; `weight` is integers times scales.

    weight: `[out, in]`, float32 or the stored type. scales: float32 `[out, in / group_size]`, not
    0; negative ones turn the grid around. bits: of an integer, 4 or 8.
    """

    weight: NDArray[Any]
    scales: NDArray[np.float32]
    bits: int


@dataclass(frozen=True)
class SmoothQuantMatrix:
    """A matrix for 8-bit weights and activations; types and pre_quant_scale as in AwqMatrix.

    weight: `[out, in]`. scales: `[out]`, amax / 127 of each row. pre_quant_scale: `[in]`.
    activation_scale: amax / 127 of `x * pre_quant_scale`.
    """

    weight: NDArray[Any]
    scales: NDArray[np.float32]
    pre_quant_scale: NDArray[np.float32]
    activation_scale: float


@dataclass(frozen=True)
class Fp8Scales:
    """Scales of a matrix and of its input: amax / 448."""

    weight: float
    activation: float


CalibratedMatrix = AwqMatrix | RoundedWeights | SmoothQuantMatrix | Fp8Scales


@dataclass(frozen=True)
class KvAmax:
    """Amax of keys and of values as they enter the cache."""

    key: float
    value: float
