"""Gives each rank of an engine a GPU of its own."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from mpt_trt.errors import SharedError
from mpt_trt.system import gpus
from mpt_trt.system.mpi import Communicator


@dataclass(frozen=True)
class Place:
    """Where a rank runs: the host, and the identifiers of the GPUs that it may use there."""

    host: str
    gpus: tuple[str, ...]


def own_gpu(ranks: Communicator) -> str:
    """Identifier of this rank's GPU; all ranks call together.

    Raises SharedError when a rank would have none, or one that another rank has.
    """
    own = Place(socket.gethostname(), gpus.identifiers())
    return assign_gpus(ranks.exchange(own))[ranks.rank]


def assign_gpus(places: Sequence[Place]) -> list[str]:
    """Assigns GPUs to ranks, in the order of both, by the ranks' places.

    A launcher may show all GPUs of a host to each of its ranks, or to each rank its own.

    Raises SharedError when a rank would have none, or one that another rank has.
    """
    assigned: dict[tuple[str, str], int] = {}
    for rank, place in enumerate(places):
        index = places[:rank].count(place)
        if index >= len(place.gpus):
            raise SharedError(
                f"{places.count(place)} ranks on {place.host} share {len(place.gpus)} GPU(s), but "
                "each rank needs its own; start fewer ranks there, or set CUDA_VISIBLE_DEVICES= to "
                "use the CPU"
            )
        key = (place.host, place.gpus[index])
        if key in assigned:
            raise SharedError(
                f"ranks {assigned[key]} and {rank} have the same GPU of {place.host} "
                f"({place.gpus[index]}); give each rank its own with CUDA_VISIBLE_DEVICES"
            )
        assigned[key] = rank
    return [identifier for _, identifier in assigned]
