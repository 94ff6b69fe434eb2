"""Which NVIDIA GPUs this machine has, from the driver's management library (NVML)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def compute_capabilities() -> tuple[str, ...]:
    """Compute capability of every GPU as "8.9", in NVML's order; empty without a driver."""
    import pynvml

    pairs = _of_every_gpu(pynvml.nvmlDeviceGetCudaComputeCapability)
    return tuple(f"{major}.{minor}" for major, minor in pairs)


@functools.cache
def memory_sizes() -> tuple[int, ...]:
    """Memory of every GPU in bytes, in NVML's order; empty without a driver."""
    import pynvml

    return tuple(memory.total for memory in _of_every_gpu(pynvml.nvmlDeviceGetMemoryInfo))


@functools.cache
def names() -> tuple[str, ...]:
    """Product name of every GPU, in NVML's order; empty without a driver."""
    import pynvml

    return tuple(_of_every_gpu(pynvml.nvmlDeviceGetName))


def _of_every_gpu(query: Callable[[Any], Any]) -> list[Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        count = pynvml.nvmlDeviceGetCount()
        return [query(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
    finally:
        pynvml.nvmlShutdown()
