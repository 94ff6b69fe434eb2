"""What calibration finds out about a matrix and about a layer's cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The largest values of the formats; a scale is the largest magnitude over it.
INT4_MAX, INT8_MAX, FP8_MAX = 7, 127, 448


@dataclass(frozen=True)
class AwqMatrix:
    """A matrix for 4-bit groups; `x W^T` is `(x * pre_quant_scale) weight^T`.

    weight: `[out, in]`, already divided by pre_quant_scale. scales: `[out, in / group_size]`, a
    group's largest magnitude over 7. pre_quant_scale: `[in]`. All float32; of a matrix that was
    read from a file, weight has the type in which it is stored.
    """

    weight: NDArray
    scales: NDArray[np.float32]
    pre_quant_scale: NDArray[np.float32]


@dataclass(frozen=True)
class SmoothQuantMatrix:
    """A matrix for 8-bit weights and activations; types and pre_quant_scale as in AwqMatrix.

    weight: `[out, in]`. scales: `[out]`, a row's largest magnitude over 127. pre_quant_scale:
    `[in]`. activation_scale: the largest magnitude of `x * pre_quant_scale` over 127.
    """

    weight: NDArray
    scales: NDArray[np.float32]
    pre_quant_scale: NDArray[np.float32]
    activation_scale: float


@dataclass(frozen=True)
class Fp8Scales:
    """The largest magnitudes over 448, of a matrix and of what it is multiplied with."""

    weight: float
    activation: float


CalibratedMatrix = AwqMatrix | SmoothQuantMatrix | Fp8Scales


@dataclass(frozen=True)
class KvRanges:
    """The largest magnitudes of keys and of values as they enter the cache."""

    key: float
    value: float
