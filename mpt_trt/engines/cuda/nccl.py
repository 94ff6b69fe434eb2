"""Connects ranks with NCCL; MPI exchanges its id."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, closing
from functools import partial
from typing import Any

import numpy as np

from mpt_trt.engines.cuda.memory import DeviceBuffer, Stream
from mpt_trt.errors import MptTrtError
from mpt_trt.system.mpi import Communicator
from mpt_trt.system.rank_watch import RankWatch

CAPSULE_NAME = b"ncclComm_t"
# Of ncclDataType_t and ncclRedOp_t.
FLOAT32, SUM = 7, 0
# Of ncclResult_t.
SUCCESS, IN_PROGRESS = 0, 7
REMEDY = "several ranks on GPUs need it: pip install nccl4py nvidia-nccl-cu13"


class Nccl:
    """NCCL's communicator of all ranks, destroyed with the object, which all ranks must drop.

    NCCL waits until graphs that were captured with it are destroyed.
    """

    def __init__(self, communicator: Any, patience_seconds: float):
        self._communicator = communicator
        self.pointer: int = communicator.ptr
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.capsule = new_capsule(communicator.ptr, CAPSULE_NAME, None)
        """The communicator's pointer, as TensorRT's execution contexts take it."""
        self.library = load_library()
        """NCCL's functions, for ctypes."""
        # Without references to this object, which would keep it alive.
        find_fault = partial(_find_fault, communicator)
        self._watch = RankWatch(patience_seconds, communicator.abort, find_fault)

    def __del__(self) -> None:
        self._watch.close()
        # Does nothing after an abort.
        self._communicator.destroy()

    def limit(self) -> AbstractContextManager[None]:
        """Encloses a call that may wait for other ranks; see `RankWatch.limit`."""
        return self._watch.limit()

    def connect(self) -> None:
        """Adds a number of every rank, because NCCL connects GPUs when they first meet.

        Raises MptTrtError when they cannot be connected.
        """
        stream, number = Stream(), DeviceBuffer(4)
        total = np.ones(1, np.float32)
        number.copy_from(total, stream.handle)
        address = ctypes.c_void_p(number.address)
        handles = (ctypes.c_void_p(self.pointer), ctypes.c_void_p(int(stream.handle)))
        with self.limit():
            count = ctypes.c_size_t(1)
            if error := self.library.ncclAllReduce(address, address, count, FLOAT32, SUM, *handles):
                raise _cannot_connect(self.library.ncclGetErrorString(error).decode())
            number.copy_to(total, stream.handle)
            stream.synchronize()


def _find_fault(communicator: Any) -> str | None:
    state = int(communicator.get_async_error())
    if state in (SUCCESS, IN_PROGRESS):
        return None
    return f"NCCL has lost the other ranks (error {state}); NCCL_DEBUG=WARN shows the cause"


def load_library() -> Any:
    """The library that nccl4py has loaded, for ctypes."""
    library = ctypes.CDLL("libnccl.so.2")
    library.ncclGetErrorString.restype = ctypes.c_char_p
    return library


def nccl_obstacle() -> str | None:
    """Reason why NCCL cannot be used on this machine; None if it can."""
    try:
        from nccl import core  # optional

        core.get_version()
    except Exception as error:  # its package has many types of errors
        if isinstance(error, ModuleNotFoundError) and error.name in ("nccl", None):
            return f"NCCL is not installed; {REMEDY}"
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return f"NCCL cannot be loaded ({reason}); {REMEDY}"
    return None


def join_nccl(communicator: Communicator) -> Nccl:
    """Creates NCCL's communicator of all ranks, which must live as long as the engine.

    Raises MptTrtError when NCCL is not installed or cannot connect the ranks' GPUs.
    """
    if (obstacle := nccl_obstacle()) is not None:
        raise MptTrtError(obstacle)
    from nccl import core  # optional

    own_id = core.get_unique_id() if communicator.rank == 0 else None
    unique_id = communicator.exchange(own_id)[0]
    patience = communicator.patience_seconds
    # NCCL cannot abort what is not there yet, so a rank that waits too long ends.
    with closing(RankWatch(patience, lambda: None, lambda: None)) as watch, watch.limit():
        try:
            joined = core.Communicator.init(
                nranks=communicator.size, rank=communicator.rank, unique_id=unique_id
            )
        except Exception as error:  # the package's own types
            raise _cannot_connect(str(error)) from None
    nccl = Nccl(joined, patience)
    nccl.connect()
    return nccl


def _cannot_connect(reason: str) -> MptTrtError:
    return MptTrtError(
        f"NCCL cannot connect this rank's GPU to the other ranks' ({reason}); NCCL_DEBUG=WARN "
        "shows the cause"
    )
