"""NVIDIA GPUs that this process may use, from the driver's management library (NVML).

NVML itself shows all GPUs of the machine. This module respects CUDA_VISIBLE_DEVICES, like CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"


def compute_capabilities() -> tuple[str, ...]:
    """Compute capability of every GPU as "8.9", in the order of CUDA; empty without a driver."""
    pairs = _of_every_gpu("nvmlDeviceGetCudaComputeCapability")
    return tuple(f"{major}.{minor}" for major, minor in pairs)


def memory_sizes() -> tuple[int, ...]:
    """Memory of every GPU in bytes, in the order of CUDA; empty without a driver."""
    return tuple(memory.total for memory in _of_every_gpu("nvmlDeviceGetMemoryInfo"))


def names() -> tuple[str, ...]:
    """Product name of every GPU, in the order of CUDA; empty without a driver."""
    return _of_every_gpu("nvmlDeviceGetName")


def identifiers() -> tuple[str, ...]:
    """UUID of every GPU, in the order of CUDA; empty without a driver."""
    return _of_every_gpu("nvmlDeviceGetUUID")


def driver_version() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    with _driver() as nvml:
        return None if nvml is None else str(nvml.nvmlSystemGetDriverVersion())


def visible() -> tuple[str, ...] | None:
    """Entries of CUDA_VISIBLE_DEVICES up to the first that is not a GPU, where CUDA stops.

    An entry is an index or (the beginning of) a UUID. None when the variable is not set.
    """
    if (text := os.environ.get(VISIBLE)) is None:
        return None
    entries = [entry.strip() for entry in text.split(",")]
    is_gpu = [bool(re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", entry)) for entry in entries]
    end = is_gpu.index(False) if False in is_gpu else len(entries)
    return tuple(entries[:end])


@contextlib.contextmanager
def _driver() -> Iterator[Any]:
    """Starts the driver's library and yields `pynvml`; None without a driver."""
    # Planning imports this module, but never asks the driver.
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _of_every_gpu(query: str) -> tuple[Any, ...]:
    """Results of an NVML function for every visible GPU; empty without a driver."""
    return _queried(query, visible())


# A rank hides other ranks' GPUs from itself, so what is visible changes.
@functools.cache
def _queried(query: str, _visible: tuple[str, ...] | None) -> tuple[Any, ...]:
    with _driver() as nvml:
        if nvml is None:
            return ()
        return tuple(getattr(nvml, query)(handle) for handle in _visible_handles(nvml))


def _visible_handles(nvml: Any) -> list[Any]:
    """The handles that CUDA_VISIBLE_DEVICES names, in its order; all if it is not set."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    entries = visible()
    if entries is None:
        return handles
    by_index = {str(index): handle for index, handle in enumerate(handles)}
    by_uuid = {nvml.nvmlDeviceGetUUID(handle): handle for handle in handles}
    named = []
    for entry in entries:
        whole = [handle for uuid, handle in by_uuid.items() if uuid.startswith(entry)]
        match = by_index.get(entry) or next(iter(whole), None)
        if match is None and entry.startswith("MIG-"):
            match = nvml.nvmlDeviceGetHandleByUUID(entry)
        if match is None:
            break
        named.append(match)
    return named
