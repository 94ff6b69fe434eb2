"""GPU memory, and host memory for copies to and from it, from CUDA's runtime."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from mpt_trt.errors import MptTrtError

DEVICE_TO_DEVICE = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice


class DeviceBuffer:
    """Zeroed GPU memory that is freed with the object. size: bytes. address: as an integer."""

    def __init__(self, size: int):
        self.size = size
        self.address = 0
        self.address = int(call(cudart.cudaMalloc(size)))
        call(cudart.cudaMemset(self.address, 0, size))

    def __del__(self) -> None:
        if self.address:
            cudart.cudaFree(self.address)

    def copy_from(self, source: NDArray, stream: Any) -> None:
        """Copies a contiguous host array to the start of the buffer."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        call(cudart.cudaMemcpyAsync(self.address, source.ctypes.data, source.nbytes, kind, stream))

    def copy_from_device(self, source: DeviceBuffer, size: int, stream: Any) -> None:
        """Copies the first `size` bytes of another buffer."""
        call(cudart.cudaMemcpyAsync(self.address, source.address, size, DEVICE_TO_DEVICE, stream))

    def copy_to(self, target: NDArray, stream: Any) -> None:
        """Fills a contiguous host array from the start of the buffer."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call(cudart.cudaMemcpyAsync(target.ctypes.data, self.address, target.nbytes, kind, stream))


class PinnedBuffer:
    """Host memory for asynchronous copies, freed with the object.

    array: uint8 `[size]`, not to be used after the object is gone.
    """

    def __init__(self, size: int):
        self._address = 0
        self._address = int(call(cudart.cudaHostAlloc(size, cudart.cudaHostAllocDefault)))
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._address))

    def __del__(self) -> None:
        if self._address:
            cudart.cudaFreeHost(self._address)


class PinnedLogits:
    """Logits of a step on their way to the host: float32 `[rows, vocab]` of up to `rows` rows.

    Copies to other memory of the host are several times as slow.
    """

    def __init__(self, rows: int, vocab_size: int):
        self._shape = rows, vocab_size
        self._buffer: PinnedBuffer | None = None

    def fetch(self, source: DeviceBuffer, rows: int, stream: Any) -> NDArray[np.float32]:
        """Copies the first rows of a buffer; the result is valid until the next copy."""
        if self._buffer is None:
            self._buffer = PinnedBuffer(math.prod(self._shape) * np.float32().nbytes)
        logits = self._buffer.array.view(np.float32).reshape(self._shape)[:rows]
        source.copy_to(logits, stream)
        return logits


class Event:
    """A CUDA event, destroyed with the object."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._handle = call(cudart.cudaEventCreate())

    def __del__(self) -> None:
        if self._handle is not None:
            cudart.cudaEventDestroy(self._handle)

    def record(self, stream: Any) -> None:
        """Marks the end of the stream's present work."""
        call(cudart.cudaEventRecord(self._handle, stream))

    def synchronize(self) -> None:
        """Waits for the work that was marked."""
        call(cudart.cudaEventSynchronize(self._handle))


def call(result: tuple) -> Any:
    """Returns a CUDA call's value; raises MptTrtError with CUDA's message if it failed."""
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        text = cudart.cudaGetErrorString(status)[1].decode()
        raise MptTrtError(f"CUDA: {text}; free GPU memory or lower the engine's limits")
    return values[0] if values else None


class Stream:
    """A CUDA stream that is destroyed with the object. handle: what CUDA's functions take."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.handle = call(cudart.cudaStreamCreate())

    def __del__(self) -> None:
        if self.handle is not None:
            cudart.cudaStreamDestroy(self.handle)

    def synchronize(self) -> None:
        """Waits for everything on the stream."""
        call(cudart.cudaStreamSynchronize(self.handle))


@dataclass(frozen=True)
class Block:
    """A box of bytes in a three-dimensional array of bytes `[depth, height, width]`.

    address, width, height: those of the array. start: (z, y, x) of the box's first byte.
    """

    address: int
    height: int
    width: int
    start: tuple[int, int, int]


def copy_block(source: Block, target: Block, extent: tuple[int, int, int], stream: Any) -> None:
    """Copies a box of `extent` (depth, height, width) bytes from one array to another."""
    parameters = cudart.cudaMemcpy3DParms()
    parameters.srcPtr, parameters.srcPos = _pitched(source)
    parameters.dstPtr, parameters.dstPos = _pitched(target)
    depth, height, width = extent
    parameters.extent = cudart.make_cudaExtent(width, height, depth)
    parameters.kind = DEVICE_TO_DEVICE
    call(cudart.cudaMemcpy3DAsync(parameters, stream))


def _pitched(block: Block) -> tuple[Any, Any]:
    z, y, x = block.start
    pointer = cudart.make_cudaPitchedPtr(block.address, block.width, block.width, block.height)
    return pointer, cudart.make_cudaPos(x, y, z)
