"""Describes this machine, for results that depend on it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from mpt_trt.system import gpus

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU. memory: in bytes. compute_capability: as "8.9"."""

    name: str
    memory: int
    compute_capability: str


@dataclass(frozen=True)
class Machine:
    """Hardware and versions. cores and gpus: those that this process may use."""

    processor: str
    cores: int
    memory_gib: float
    gpus: tuple[Gpu, ...]
    system: str
    python: str

    @property
    def memory(self) -> int:
        """Host memory in bytes."""
        return round(self.memory_gib * GIB)


def describe_machine() -> Machine:
    """Reads the processor, cores, memory, GPUs and versions of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parts = zip(gpus.names(), gpus.memory_sizes(), gpus.compute_capabilities(), strict=True)
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory / GIB, 1),
        gpus=tuple(Gpu(*fields) for fields in parts),
        system=platform.platform(),
        python=platform.python_version(),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
