"""Rounds matrices to E4M3, eight-bit floating point numbers (arXiv:2209.05433)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import convert
from mpt_trt.quantization.calibrated_weights import FP8_MAX
from mpt_trt.quantization.integers import FLOAT32

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = np.float32(FP8_MAX)


def quantized_block(block: NDArray[Any], scale: float) -> NDArray[Any]:
    """Divides part of a matrix by its scale and rounds it to E4M3; no finite value becomes NaN."""
    scaled = convert(block, FLOAT32) / np.float32(scale)
    return np.clip(scaled, -LARGEST, LARGEST).astype(E4M3)
