"""The used parts of NCCL and of its Python package `nccl.core`, over MPI."""

from __future__ import annotations

import ctypes
import math
import traceback
import types
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mpt_trt.system.mpi import Communicator as MpiCommunicator
from support.simulated.cuda import Operation
from support.simulated.memory import view
from support.simulated.rules import Rule
from support.simulated.tensorrt import World

FIRST_POINTER = 0x6000_0000
LIBRARY = "libnccl.so.2"
SUM = 0
INTERNAL_ERROR = 3
DTYPES: dict[int, Any] = {6: np.float16, 7: np.float32, 9: ml_dtypes.bfloat16}

Pointer, Size = ctypes.c_void_p, ctypes.c_size_t
AllReduce = ctypes.CFUNCTYPE(
    ctypes.c_int, Pointer, Pointer, Size, ctypes.c_int, ctypes.c_int, Pointer, Pointer
)
AllGather = ctypes.CFUNCTYPE(ctypes.c_int, Pointer, Pointer, Size, ctypes.c_int, Pointer, Pointer)
# An address, because ctypes would not free text.
ErrorString = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int)


class Aborted(Exception):
    """The end of a wait for other ranks."""


class AbortableRanks(MpiCommunicator):
    """Ranks that wait for each other until they are aborted, as NCCL's kernels do."""

    def __init__(self, ranks: MpiCommunicator):
        super().__init__(ranks._world, math.inf)
        self.is_aborted = False

    def _raise_if_interrupted(self) -> None:
        if self.is_aborted:
            raise Aborted


def make_core(world: World, ranks: Any) -> types.ModuleType:
    """The module. ranks: this process's MPI communicator."""

    class Communicator:
        def __init__(self, ptr: int) -> None:
            self.ptr = ptr

        @classmethod
        def init(cls, nranks: int, rank: int, unique_id: Any) -> Communicator:
            assert ranks is not None and (nranks, rank) == (ranks.size, ranks.rank)
            # Every rank must have the identifier of the same rank.
            assert set(ranks.exchange(unique_id)) == {unique_id}
            pointer = FIRST_POINTER + 256 * (1 + len(world.communicators))
            is_real = isinstance(ranks, MpiCommunicator)
            world.communicators[pointer] = AbortableRanks(ranks) if is_real else ranks
            return cls(pointer)

        def destroy(self) -> None:
            if self.ptr not in world.communicators:
                return  # aborted
            # It waits for the graphs that were captured with it.
            graphs = world.cuda.count_graphs()
            world.book.require(not graphs, Rule.RELEASED, f"{graphs} graphs before NCCL")
            del world.communicators[self.ptr]

        def abort(self) -> None:
            world.communicators.pop(self.ptr).is_aborted = True

        def get_async_error(self) -> int:
            return 0

    core = types.ModuleType("nccl.core")
    core.Communicator = Communicator  # type: ignore[attr-defined]
    core.get_unique_id = lambda: "unique"  # type: ignore[attr-defined]
    core.get_version = lambda: "simulated"  # type: ignore[attr-defined]
    return core


def make_library(world: World) -> types.SimpleNamespace:
    """NCCL's library as ctypes would load it."""

    def run(name: str, stream: int | None, action: Callable[[], None]) -> int:
        if stream:
            world.cuda.put(stream, Operation(name, action))
            return 0
        try:  # called by an operator on the CPU; an exception would be lost
            action()
        except Aborted:
            return INTERNAL_ERROR
        except Exception:
            traceback.print_exc()
            return INTERNAL_ERROR
        return 0

    def gather(send: int, count: int, data_type: int, communicator: int) -> NDArray:
        """Values of all ranks, `[ranks, count]`."""
        dtype = np.dtype(DTYPES[data_type])
        own = view(send, count * dtype.itemsize).tobytes()
        ranks = world.communicators[communicator]
        # A real call is not interrupted, either.
        with ranks.deferred_interrupts():
            every = ranks.exchange(own)
        return np.stack([np.frombuffer(each, dtype) for each in every])

    def write(recv: int, values: NDArray) -> None:
        view(recv, values.nbytes)[:] = np.ascontiguousarray(values).view(np.uint8).ravel()

    def all_reduce(send, recv, count, data_type, operation, communicator, stream) -> int:
        def action() -> None:
            every = gather(send, count, data_type, communicator)
            write(recv, every.astype(np.float32).sum(axis=0).astype(every.dtype))

        assert operation == SUM
        return run("ncclAllReduce", stream, action)

    def all_gather(send, recv, count, data_type, communicator, stream) -> int:
        def action() -> None:
            write(recv, gather(send, count, data_type, communicator))

        return run("ncclAllGather", stream, action)

    return types.SimpleNamespace(
        ncclAllReduce=AllReduce(all_reduce),
        ncclAllGather=AllGather(all_gather),
        ncclGetErrorString=ErrorString(_error_string),
    )


ERROR_TEXT = ctypes.create_string_buffer(b"internal error (simulated)")


def _error_string(_: int) -> int:
    return ctypes.addressof(ERROR_TEXT)
