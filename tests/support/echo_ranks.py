"""Ranks of which only one is there: the others' tensors are taken to be the same."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray


class EchoRanks:
    """Stands in for MPI's communicator."""

    patience_seconds = 300.0

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def exchange(self, value: Any) -> list[Any]:
        return [value] * self.size

    def all_reduce(self, value: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.sum([value] * self.size, axis=0, dtype=np.float32)

    def all_gather(self, value: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([value] * self.size)

    def deferred_interrupts(self) -> nullcontext:
        return nullcontext()
