"""Connects ranks with NCCL for TensorRT's collective layers; MPI exchanges its id."""

from __future__ import annotations

import ctypes
from typing import Any

from mpt_trt.errors import MptTrtError
from mpt_trt.system.mpi import Communicator

CAPSULE_NAME = b"ncclComm_t"


class Nccl:
    """NCCL's communicator of all ranks, destroyed with the object, which all ranks must drop.

    NCCL waits until graphs that were captured with it are destroyed.
    """

    def __init__(self, communicator: Any):
        self._communicator = communicator
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self.capsule = new_capsule(communicator.ptr, CAPSULE_NAME, None)
        """The communicator's pointer, as execution contexts take it."""

    def __del__(self) -> None:
        self._communicator.destroy()


def join_nccl(communicator: Communicator) -> Nccl:
    """Creates NCCL's communicator of all ranks, which must live as long as the engine.

    Raises MptTrtError when the package nccl4py is not installed.
    """
    try:
        from nccl import core
    except ImportError:
        raise MptTrtError(
            "TensorRT needs NCCL for engines of several ranks: pip install nccl4py"
        ) from None
    own_id = core.get_unique_id() if communicator.rank == 0 else None
    unique_id = communicator.exchange(own_id)[0]
    return Nccl(
        core.Communicator.init(
            nranks=communicator.size, rank=communicator.rank, unique_id=unique_id
        )
    )
