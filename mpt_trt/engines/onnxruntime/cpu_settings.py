"""How ONNX Runtime computes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activations = Literal["exact", "int8"]
"""What 4- and 8-bit weights are multiplied by: numbers as the network has them, or rounded to 8
bits in blocks, which CPUs multiply faster. Results differ: docs/performance.md has how much."""


@dataclass(frozen=True)
class CpuSettings:
    """num_threads: 0 for all cores."""

    num_threads: int = 0
    activations: Activations = "exact"
