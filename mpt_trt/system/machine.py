"""Describes this machine, for results that depend on it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from mpt_trt.system import gpus

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """Hardware and versions. cores: those that this process may use. gpus: their product names."""

    processor: str
    cores: int
    memory_gib: float
    gpus: tuple[str, ...]
    system: str
    python: str


def describe_machine() -> Machine:
    """Reads the processor, cores, memory, GPUs and versions of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory / GIB, 1),
        gpus=gpus.names(),
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
