"""The used parts of NCCL's Python package `nccl.core`, over MPI."""

from __future__ import annotations

import types
from typing import Any

from mpt_trt.system.mpi import Communicator as MpiCommunicator
from support.simulated.rules import Rule
from support.simulated.tensorrt import World

FIRST_POINTER = 0x6000_0000


def make_core(world: World, ranks: MpiCommunicator | None) -> types.ModuleType:
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
            world.communicators[pointer] = ranks
            return cls(pointer)

        def destroy(self) -> None:
            # It waits for the graphs that were captured with it.
            graphs = world.cuda.count_graphs()
            world.book.require(not graphs, Rule.RELEASED, f"{graphs} graphs before NCCL")
            del world.communicators[self.ptr]

    core = types.ModuleType("nccl.core")
    core.Communicator = Communicator  # type: ignore[attr-defined]
    core.get_unique_id = lambda: "unique"  # type: ignore[attr-defined]
    return core
