"""Which NVIDIA GPUs this machine has, from the driver's management library (NVML)."""

from __future__ import annotations

import functools


@functools.cache
def compute_capabilities() -> tuple[str, ...]:
    """Compute capability of every GPU as "8.9", in NVML's order; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        pairs = [pynvml.nvmlDeviceGetCudaComputeCapability(handle) for handle in handles]
        return tuple(f"{major}.{minor}" for major, minor in pairs)
    finally:
        pynvml.nvmlShutdown()
