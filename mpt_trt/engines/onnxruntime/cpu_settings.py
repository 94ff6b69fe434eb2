"""Settings of ONNX Runtime on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activations = Literal["exact", "int8"]
"""Activations that 4- and 8-bit weights are multiplied by: exact, or rounded to 8 bits in blocks,
which CPUs multiply faster. docs/performance.md has the speed and the differences in results."""


@dataclass(frozen=True)
class CpuSettings:
    """Threads and arithmetic of a session. num_threads: 0 for all cores."""

    num_threads: int = 0
    activations: Activations = "exact"
