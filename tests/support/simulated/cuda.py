"""CUDA's runtime on host memory, executed lazily.

Work on a stream runs when something waits for it, and not before. So a missing wait leaves results
out, and a buffer that is changed too early gives wrong ones. Copies from pageable memory take its
content at once, as CUDA documents.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cuda.bindings import runtime as real

from support.simulated.memory import POISON, Memory, view
from support.simulated.rules import Book, Rule

SUCCESS = real.cudaError_t.cudaSuccess
OUT_OF_MEMORY = real.cudaError_t.cudaErrorMemoryAllocation
KIND = real.cudaMemcpyKind
FIRST_HANDLE = 0x5000_0000
HANDLE_STEP = 16
COMPUTE_CAPABILITY_MAJOR = 8


@dataclass
class Operation:
    """Work on a stream.

    before_launch: checks that a launch of a graph with it makes at once. writes_pageable: it writes
    to memory that is there for certain only while the host waits for it.
    """

    name: str
    run: Callable[[], None]
    writes_pageable: bool = False
    before_launch: Callable[[], None] = lambda: None
    context: Any = None


@dataclass
class _Stream:
    queue: deque[Operation] = field(default_factory=deque)
    capture: list[Operation] | None = None
    # A copy into pageable memory that nothing has waited for.
    unawaited: str | None = None


class SimulatedCuda:
    """The parts of `cuda.bindings.runtime` that are used here; types and enums are real."""

    def __init__(self, book: Book, devices: int = 1):
        self.book, self.memory = book, Memory(book)
        self.devices = devices
        self.launches = 0
        self._handles: dict[int, Any] = {}
        self._next = FIRST_HANDLE

    def __getattr__(self, name: str) -> Any:
        found = getattr(real, name)
        if inspect.isclass(found) or name.startswith("make_") or name == "cudaGetErrorString":
            return found
        if not callable(found):
            return found
        raise AttributeError(f"{name} is not simulated")

    # --- devices ---

    def cudaGetDeviceCount(self) -> tuple:
        return SUCCESS, self.devices

    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> tuple:
        assert attr == real.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor
        return SUCCESS, COMPUTE_CAPABILITY_MAJOR

    # --- memory ---

    def cudaMalloc(self, size: int) -> tuple:
        return self._allocate(size, is_device=True)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple:
        return self._allocate(size, is_device=False)

    def cudaFree(self, devPtr: int) -> tuple:
        return self._free(devPtr, is_device=True)

    def cudaFreeHost(self, ptr: int) -> tuple:
        return self._free(ptr, is_device=False)

    def cudaMemset(self, devPtr: int, value: int, count: int) -> tuple:
        self._require_no_capture(Rule.CAPTURE_HOST_WAIT, "cudaMemset")
        # On the legacy default stream, which waits for the others.
        self.drain_all()
        self.memory.require_live(devPtr, count, "cudaMemset")
        view(devPtr, count)[:] = value
        return (SUCCESS,)

    def _allocate(self, size: int, is_device: bool) -> tuple:
        self._require_no_capture(Rule.CAPTURE_ALLOCATION, "allocation")
        address = self.memory.allocate(size, is_device)
        return (OUT_OF_MEMORY, None) if address is None else (SUCCESS, address)

    def _free(self, address: int, is_device: bool) -> tuple:
        if address:
            self._require_no_capture(Rule.CAPTURE_ALLOCATION, "free")
            if is_device:
                # CUDA waits for memory of cudaMalloc (CUDA Driver API, cuMemFree), only for that.
                self.drain_all()
            self.memory.free(address, is_device)
        return (SUCCESS,)

    # --- copies ---

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> tuple:
        name = f"{kind.name} of {count} bytes"
        self._require_kind(kind, dst, src, count, name)
        if count == 0:
            return (SUCCESS,)
        if kind == KIND.cudaMemcpyHostToDevice and not self.memory.is_known(src):
            self._require_not_captured(stream, name)
            content = view(src, count).copy()
            self.put(stream, Operation(name, lambda: self._write(dst, content, name)))
            return (SUCCESS,)
        is_pageable = kind == KIND.cudaMemcpyDeviceToHost and not self.memory.is_known(dst)
        if is_pageable:
            self._require_not_captured(stream, name)
            # A reader that does not wait reads this.
            view(dst, count)[:] = POISON

        def copy() -> None:
            self.memory.require_live(src, count, name)
            if is_pageable:
                view(dst, count)[:] = view(src, count)
            else:
                self._write(dst, view(src, count).copy(), name)

        self.put(stream, Operation(name, copy, is_pageable))
        if is_pageable:
            self._stream(stream).unawaited = name
        return (SUCCESS,)

    def cudaMemcpy3DAsync(self, p: Any, stream: Any) -> tuple:
        extent = (p.extent.depth, p.extent.height, p.extent.width)
        source, target = _Box.of(p.srcPtr, p.srcPos), _Box.of(p.dstPtr, p.dstPos)
        return self._copy_box(target, source, extent, p.kind, stream)

    def cudaMemcpy2DAsync(
        self,
        dst: int,
        dpitch: int,
        src: int,
        spitch: int,
        width: int,
        height: int,
        kind: Any,
        stream: Any,
    ) -> tuple:
        source, target = _Box(src, spitch, height), _Box(dst, dpitch, height)
        return self._copy_box(target, source, (1, height, width), kind, stream)

    def _copy_box(
        self, target: _Box, source: _Box, extent: tuple[int, int, int], kind: Any, stream: Any
    ) -> tuple:
        self.book.require(
            kind == KIND.cudaMemcpyDeviceToDevice, Rule.COPY_KIND, "boxes here are on the device"
        )
        for box in (source, target):
            self.book.require(
                box.holds(extent), Rule.BOX_IN_ARRAY, f"{extent} from {box.start} in {box}"
            )

        def copy() -> None:
            for box in (source, target):
                self.memory.require_live(*box.span(extent), "3D copy")
            target.bytes(extent)[:] = source.bytes(extent).copy()

        self.put(stream, Operation("3D copy", copy))
        return (SUCCESS,)

    def _write(self, address: int, content: Any, name: str) -> None:
        self.memory.require_live(address, content.size, name)
        view(address, content.size)[:] = content

    def _require_kind(self, kind: Any, dst: int, src: int, count: int, name: str) -> None:
        if count == 0:
            return
        on_device = {
            KIND.cudaMemcpyHostToDevice: (False, True),
            KIND.cudaMemcpyDeviceToHost: (True, False),
            KIND.cudaMemcpyDeviceToDevice: (True, True),
        }[kind]
        for address, is_device in zip((src, dst), on_device, strict=True):
            if self.memory.is_known(address):
                self.memory.require_live(address, count, name)
            found = self.memory.find(address, count)
            is_right = (found is not None and found.is_device) == is_device
            self.book.require(is_right, Rule.COPY_KIND, name)

    # --- streams and events ---

    def cudaStreamCreate(self) -> tuple:
        return SUCCESS, real.cudaStream_t(self._new(_Stream()))

    def cudaStreamDestroy(self, stream: Any) -> tuple:
        found = self._stream(stream)
        self._drain(found, is_waiting=False)
        del self._handles[int(stream)]
        self.book.require(not found.queue, Rule.HOST_COPY_AWAITED, "end of the stream")
        return (SUCCESS,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple:
        self._require_no_capture(Rule.CAPTURE_HOST_WAIT, "cudaStreamSynchronize")
        self._drain(self._stream(stream))
        return (SUCCESS,)

    def cudaEventCreate(self) -> tuple:
        return SUCCESS, real.cudaEvent_t(self._new({"stream": None, "is_done": True}))

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple:
        state = self._get(event)
        state.update(stream=stream, is_done=False)
        self.put(stream, Operation("event", lambda: state.update(is_done=True)))
        return (SUCCESS,)

    def cudaEventSynchronize(self, event: Any) -> tuple:
        self._require_no_capture(Rule.CAPTURE_HOST_WAIT, "cudaEventSynchronize")
        state = self._get(event)
        while not state["is_done"]:
            self._run_next(self._stream(state["stream"]))
        return (SUCCESS,)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> tuple:
        return SUCCESS, 0.0

    def cudaEventDestroy(self, event: Any) -> tuple:
        self._get(event)
        del self._handles[int(event)]
        return (SUCCESS,)

    # --- graphs ---

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple:
        found = self._stream(stream)
        self.book.require(found.capture is None, Rule.CAPTURE_PAIRED, "a second capture")
        found.capture = []
        return (SUCCESS,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple:
        found = self._stream(stream)
        self.book.require(found.capture is not None, Rule.CAPTURE_PAIRED, "no capture to end")
        graph, found.capture = found.capture, None
        return SUCCESS, real.cudaGraph_t(self._new(graph))

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple:
        return SUCCESS, real.cudaGraphExec_t(self._new(list(self._get(graph))))

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> tuple:
        operations = self._get(graphExec)
        self.launches += 1
        for each in operations:
            each.before_launch()
        for each in operations:
            self.put(stream, each)
        return (SUCCESS,)

    def cudaGraphDestroy(self, graph: Any) -> tuple:
        self._get(graph)
        del self._handles[int(graph)]
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple:
        self._get(graphExec)
        del self._handles[int(graphExec)]
        return (SUCCESS,)

    # --- used by the simulated TensorRT and tests ---

    def put(self, stream: Any, operation: Operation) -> None:
        """Puts work on a stream, or into the graph that is being captured from it."""
        found = self._stream(stream)
        self.book.require(
            found.unawaited is None, Rule.HOST_COPY_AWAITED, f"{operation.name} on the stream"
        )
        if found.capture is None:
            found.queue.append(operation)
        else:
            found.capture.append(operation)

    def is_capturing(self, stream: Any) -> bool:
        return self._stream(stream).capture is not None

    def pending(self, stream: Any) -> list[Operation]:
        """Work that has not run yet on other streams."""
        return [
            operation
            for handle, each in self._handles.items()
            if isinstance(each, _Stream) and handle != int(stream)
            for operation in each.queue
        ]

    def drain_all(self) -> None:
        for each in list(self._handles.values()):
            if isinstance(each, _Stream):
                self._drain(each, is_waiting=False)

    def leaks(self) -> list[str]:
        """Lists objects that are still allocated or created."""
        kept = [each for each in self.memory.allocations if each.is_live]
        memory = [f"{each.size} bytes at {each.address:#x}" for each in kept]
        return memory + [type(each).__name__ for each in self._handles.values()]

    def count_graphs(self) -> int:
        """Graphs that have not been destroyed."""
        return sum(isinstance(each, list) for each in self._handles.values())

    def _drain(self, stream: _Stream, is_waiting: bool = True) -> None:
        while stream.queue and (is_waiting or not stream.queue[0].writes_pageable):
            self._run_next(stream)
        if is_waiting:
            stream.unawaited = None

    def _run_next(self, stream: _Stream) -> None:
        # Removed first: an operation that fails must not run again.
        stream.queue.popleft().run()

    def _new(self, what: Any) -> int:
        self._next += HANDLE_STEP
        self._handles[self._next] = what
        return self._next

    def _get(self, handle: Any) -> Any:
        self.book.require(int(handle) in self._handles, Rule.HANDLE_LIVE, type(handle).__name__)
        return self._handles[int(handle)]

    def _stream(self, stream: Any) -> _Stream:
        return self._get(stream)

    def _require_no_capture(self, rule: Rule, what: str) -> None:
        streams = [each for each in self._handles.values() if isinstance(each, _Stream)]
        self.book.require(not any(each.capture is not None for each in streams), rule, what)

    def _require_not_captured(self, stream: Any, name: str) -> None:
        self.book.require(not self.is_capturing(stream), Rule.CAPTURE_PAGEABLE_MEMORY, name)


@dataclass(frozen=True)
class _Box:
    """A box in a pitched array of bytes, by the position (z, y, x) of its first byte."""

    address: int
    pitch: int
    height: int
    start: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def of(cls, pointer: Any, position: Any) -> _Box:
        """Makes a box from CUDA's cudaPitchedPtr and cudaPos."""
        start = (int(position.z), int(position.y), int(position.x))
        return cls(int(pointer.ptr), int(pointer.pitch), int(pointer.ysize), start)

    def holds(self, extent: tuple[int, int, int]) -> bool:
        _, y, x = self.start
        return x + extent[2] <= self.pitch and y + extent[1] <= self.height

    def span(self, extent: tuple[int, int, int]) -> tuple[int, int]:
        """First address and number of bytes from there to the end."""
        (z, y, x), slice_bytes = self.start, self.pitch * self.height
        first = z * slice_bytes + y * self.pitch + x
        depth, height, width = extent
        last = (depth - 1) * slice_bytes + (height - 1) * self.pitch + width
        return self.address + first, last

    def bytes(self, extent: tuple[int, int, int]) -> Any:
        address, size = self.span(extent)
        flat = view(address, size)
        strides = (self.pitch * self.height, self.pitch, 1)
        return np.lib.stride_tricks.as_strided(flat, extent, strides, writeable=True)
