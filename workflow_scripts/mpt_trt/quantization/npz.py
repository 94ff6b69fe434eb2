from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class AwqMatrix:
    weight: NDArray
    scales: NDArray[np.float32]
    pre_quant_scale: NDArray[np.float32]


@dataclass(frozen=True)
class Fp8Scales:
    weight: float
    activation: float


@dataclass(frozen=True)
class KvRanges:
    key: float
    value: float


class CalibrationResult:
    path: Path
    quantization_format: str
    group_size: int | None

    def awq_matrix(self, layer: int, matrix: str) -> AwqMatrix: ...
    def fp8_scales(self, layer: int, matrix: str) -> Fp8Scales: ...
    def kv_ranges(self, layer: int) -> KvRanges: ...
