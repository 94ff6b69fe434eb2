"""Tests the memory of the TensorRT runtime on any CUDA GPU, without TensorRT.

Compares buffers and both kinds of KV cache with NumPy.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from mpt_trt.engines.cuda.kv_cache import make_device_cache
from mpt_trt.engines.cuda.memory import DeviceBuffer, call
from mpt_trt.network.kv_cache import CacheShape, cache_names

SHAPE = CacheShape(num_layers=3, num_kv_heads=2, cache_len=16, head_dim=6)
HEAD_BYTES = {"auto": 4 * SHAPE.head_dim, "int8": SHAPE.head_dim}


def main() -> None:
    stream = call(cudart.cudaStreamCreate())
    check_buffers(stream)
    for cache_type in HEAD_BYTES:
        check_cache(cache_type, stream)


def check_buffers(stream) -> None:
    source = np.arange(1000, dtype=np.int64)
    first, second = DeviceBuffer(source.nbytes), DeviceBuffer(source.nbytes)
    result = np.full_like(source, -1)
    second.copy_to(result, stream)
    call(cudart.cudaStreamSynchronize(stream))
    assert not result.any(), "a new buffer is not zero"
    first.copy_from(source, stream)
    second.copy_to(result, stream)
    first.copy_to(result, stream)
    call(cudart.cudaStreamSynchronize(stream))
    assert np.array_equal(result, source), "copies went wrong"
    print("buffers work")


def check_cache(cache_type: str, stream) -> None:
    """Compares steps of several lengths and positions, and a change of rows."""
    random = np.random.default_rng(0)
    addresses: dict[str, int] = {}
    cache = make_device_cache(SHAPE, cache_type, 4, addresses.__setitem__)
    cache.start(2, stream)
    kept = np.zeros((2, *row_shape(cache_type, SHAPE.cache_len)), np.uint8)
    for seq, positions in ((5, (0, 0)), (1, (5, 3)), (1, (6, 4)), (3, (7, 7)), (1, (10, 9))):
        new = random.integers(0, 256, (2, *row_shape(cache_type, seq)), np.uint8)
        cache.before_step(seq)
        if cache_type == "auto":
            new = random.integers(0, 256, kept.shape, np.uint8)
            write(addresses, "present", new)
            kept = new
        else:
            write(addresses, "new", new)
        cache.after_step(np.array(positions), stream)
        if cache_type != "auto":
            for row, position in enumerate(positions):
                kept[row, :, :, position : position + seq] = new[row]
        call(cudart.cudaStreamSynchronize(stream))
        assert np.array_equal(read(addresses, kept.shape), kept), f"{cache_type}: step went wrong"
    rows = np.array([1, 1, 0])
    cache.reorder(rows, stream)
    call(cudart.cudaStreamSynchronize(stream))
    assert np.array_equal(read(addresses, (3, *kept.shape[1:])), kept[rows]), "reorder went wrong"
    print(f"cache of {cache_type} works")


def row_shape(cache_type: str, positions: int) -> tuple[int, ...]:
    return (2 * SHAPE.num_layers, SHAPE.num_kv_heads, positions, HEAD_BYTES[cache_type])


def write(addresses: dict[str, int], age: str, content: NDArray) -> None:
    """Writes content `[rows, parts, ...]`; each part has its own address."""
    kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
    for part, name in enumerate(cache_names(age, SHAPE.num_layers)):
        values = np.ascontiguousarray(content[:, part])
        call(cudart.cudaMemcpy(addresses[name], values.ctypes.data, values.nbytes, kind))


def read(addresses: dict[str, int], shape: tuple[int, ...]) -> NDArray:
    kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
    parts = []
    for name in cache_names("past", SHAPE.num_layers):
        values = np.empty((shape[0], *shape[2:]), np.uint8)
        call(cudart.cudaMemcpy(values.ctypes.data, addresses[name], values.nbytes, kind))
        parts.append(values)
    return np.stack(parts, axis=1)


if __name__ == "__main__":
    main()
