"""NCCL as engines use it: its communicator in a capsule, captured, and its end.

Run by mpirun, it is one of several ranks, each with a GPU of its own.
"""

from __future__ import annotations

import ctypes

import numpy as np
from cuda.bindings import runtime as cudart

from mpt_trt.engines.cuda.device import use_only
from mpt_trt.engines.cuda.graphs import PLAIN_RUNS, StepGraphs
from mpt_trt.engines.cuda.memory import DeviceBuffer, Stream, call
from mpt_trt.engines.cuda.nccl import join_nccl
from mpt_trt.system.mpi import Communicator, communicator
from mpt_trt.system.rank_gpus import own_gpu
from support.simulated.capsule import capsule_pointer

FLOAT32, SUM = 7, 0
SIZE = 256


def require_all_reduce(ranks: Communicator) -> None:
    """Adds an array of every rank, plainly, captured and replayed.

    NCCL gets the pointer that TensorRT would get.
    """
    nccl = join_nccl(ranks)
    pointer = capsule_pointer(nccl.capsule)
    library = ctypes.CDLL("libnccl.so.2")
    stream, source, target = Stream(), DeviceBuffer(4 * SIZE), DeviceBuffer(4 * SIZE)
    source.copy_from(np.arange(SIZE, dtype=np.float32) + ranks.rank, stream.handle)
    graphs = StepGraphs(stream.handle)
    found = np.empty(SIZE, np.float32)

    def reduce() -> None:
        addresses = (ctypes.c_void_p(source.address), ctypes.c_void_p(target.address))
        handles = (ctypes.c_void_p(pointer), ctypes.c_void_p(int(stream.handle)))
        assert library.ncclAllReduce(*addresses, ctypes.c_size_t(SIZE), FLOAT32, SUM, *handles) == 0

    expected = ranks.size * np.arange(SIZE) + sum(range(ranks.size))
    for _ in range(PLAIN_RUNS + 3):
        call(cudart.cudaMemset(target.address, 0, 4 * SIZE))
        graphs.run(None, reduce, reduce)
        target.copy_to(found, stream.handle)
        stream.synchronize()
        assert np.array_equal(found, expected)
    # NCCL waits for graphs that are not destroyed; in this order it ends.
    graphs.clear()
    del nccl


def main() -> None:
    ranks = communicator(2)
    assert ranks is not None
    use_only(own_gpu(ranks))
    require_all_reduce(ranks)


if __name__ == "__main__":
    main()
