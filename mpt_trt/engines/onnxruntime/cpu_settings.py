"""Settings of ONNX Runtime on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mpt_trt.errors import MptTrtError
from mpt_trt.system.json_text import shown

MOST_THREADS = 4096

Activations = Literal["exact", "int8"]
"""Activations that 4- and 8-bit weights are multiplied by: exact, or rounded to 8 bits in blocks,
which is faster on CPUs and less exact (docs/appendix/experiments.md)."""


@dataclass(frozen=True)
class CpuSettings:
    """Threads and arithmetic of a session. num_threads: 0 for all cores."""

    num_threads: int = 0
    activations: Activations = "exact"

    def __post_init__(self) -> None:
        if not 0 <= self.num_threads <= MOST_THREADS:
            raise MptTrtError(
                f"num_threads = {self.num_threads}: 0 (all cores) to {MOST_THREADS} is possible"
            )
        if self.activations not in (known := get_args(Activations)):
            raise MptTrtError(
                f"activations = {shown(self.activations)}: one of {', '.join(known)} is possible"
            )
