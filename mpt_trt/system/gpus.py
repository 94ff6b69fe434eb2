"""Which NVIDIA GPUs this process may use, from the driver's management library (NVML).

NVML itself shows all GPUs of the machine. Here CUDA_VISIBLE_DEVICES counts, as it does for CUDA.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"


@functools.cache
def compute_capabilities() -> tuple[str, ...]:
    """Compute capability of every GPU as "8.9", in the order of CUDA; empty without a driver."""
    import pynvml

    pairs = _of_every_gpu(pynvml.nvmlDeviceGetCudaComputeCapability)
    return tuple(f"{major}.{minor}" for major, minor in pairs)


@functools.cache
def memory_sizes() -> tuple[int, ...]:
    """Memory of every GPU in bytes, in the order of CUDA; empty without a driver."""
    import pynvml

    return tuple(memory.total for memory in _of_every_gpu(pynvml.nvmlDeviceGetMemoryInfo))


@functools.cache
def names() -> tuple[str, ...]:
    """Product name of every GPU, in the order of CUDA; empty without a driver."""
    import pynvml

    return tuple(_of_every_gpu(pynvml.nvmlDeviceGetName))


@functools.cache
def identifiers() -> tuple[str, ...]:
    """UUID of every GPU, in the order of CUDA; empty without a driver."""
    import pynvml

    return tuple(_of_every_gpu(pynvml.nvmlDeviceGetUUID))


def driver_version() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()


def visible() -> tuple[str, ...] | None:
    """The entries of CUDA_VISIBLE_DEVICES up to the first that is no GPU, where CUDA stops.

    An entry is an index or (the beginning of) a UUID. None when the variable is not set.
    """
    if (text := os.environ.get(VISIBLE)) is None:
        return None
    entries = [entry.strip() for entry in text.split(",")]
    is_gpu = [bool(re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", entry)) for entry in entries]
    end = is_gpu.index(False) if False in is_gpu else len(entries)
    return tuple(entries[:end])


def _of_every_gpu(query: Callable[[Any], Any]) -> list[Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        count = pynvml.nvmlDeviceGetCount()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        return [query(handle) for handle in _visible_of(handles)]
    finally:
        pynvml.nvmlShutdown()


def _visible_of(handles: list[Any]) -> list[Any]:
    """The handles that CUDA_VISIBLE_DEVICES names, in its order; all if it is not set."""
    import pynvml

    entries = visible()
    if entries is None:
        return handles
    named = {str(index): handle for index, handle in enumerate(handles)}
    uuids = {pynvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
    found = []
    for entry in entries:
        whole = [handle for uuid, handle in uuids.items() if uuid.startswith(entry)]
        match = named.get(entry) or next(iter(whole), None)
        if match is None and entry.startswith("MIG-"):
            match = pynvml.nvmlDeviceGetHandleByUUID(entry)
        if match is None:
            break
        found.append(match)
    return found
