"""A rank whose collectives take the other ranks' parts for its own: sums stay, and parts repeat.

The same on a CPU, in place of MPI, and on a GPU, through an NCCL communicator of one rank.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.cuda.nccl import Nccl
from support.echo_ranks import EchoRanks

ELEMENT_BYTES = {6: 2, 7: 4, 9: 2}  # by ncclDataType_t
AllGather = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
)


class IdentityRanks(EchoRanks):
    """Stands in for MPI's communicator."""

    def all_reduce(self, value: NDArray[np.float32]) -> NDArray[np.float32]:
        return value.copy()


class IdentityNccl:
    """Stands in for the NCCL communicator of `size` ranks; uses one of a single rank."""

    def __init__(self, nccl: Nccl, size: int):
        self._nccl, self.pointer = nccl, nccl.pointer
        gather = nccl.library.ncclAllGather
        void = ctypes.c_void_p

        def all_gather(send, recv, count, data_type, communicator, stream) -> int:
            step, status = count * ELEMENT_BYTES[data_type], 0
            for index in range(size):
                where = void(recv + index * step)
                handles = (void(communicator), void(stream))
                status |= gather(void(send), where, ctypes.c_size_t(count), data_type, *handles)
            return status

        self.library = SimpleNamespace(
            ncclAllReduce=nccl.library.ncclAllReduce,
            ncclAllGather=AllGather(all_gather),
            ncclGetErrorString=nccl.library.ncclGetErrorString,
        )

    def limit(self) -> AbstractContextManager[None]:
        return self._nccl.limit()
