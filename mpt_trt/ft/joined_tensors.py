"""Joins whole tensors of an FT checkpoint from the files of its ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import held
from mpt_trt.model.sharding import Rank, all_ranks
from mpt_trt.model.tensors import Weight


@dataclass(frozen=True)
class FtTensors:
    """Tensors as Hugging Face stores them: `[out_features, in_features]`."""

    checkpoint: FtCheckpoint

    def tensor(self, weight: Weight) -> NDArray[Any]:
        """Joins a whole tensor, `weight.shape`, in the checkpoint's storage type."""
        ranks = all_ranks(self.checkpoint.tp_size)
        shared = self.checkpoint.file_of(weight, ranks[0])
        if shared.rank is None:
            return self.checkpoint.mapped(shared)
        whole = np.empty(weight.shape, STORAGE_TYPES[self.checkpoint.storage_type])
        for rank in ranks:
            self._fill_part(whole, weight, rank)
        return whole

    def corner(self, weight: Weight, size: tuple[int, ...]) -> NDArray[Any]:
        """Reads the first rows and columns of a tensor: at most `size`, all from one file."""
        file = self.checkpoint.file_of(weight, Rank(0, self.checkpoint.tp_size))
        stored = self.checkpoint.mapped(file)
        if file.rank is None:
            return stored[tuple(map(slice, size))]
        rows, _ = held(self.checkpoint.config, weight, file.rank)
        height = min(len(rows[0]), size[0])
        return stored.T[(slice(height), *map(slice, size[1:]))]

    def _fill_part(self, whole: NDArray[Any], weight: Weight, rank: Rank) -> None:
        """Copies a rank's part to its place; ranks that replicate K/V heads have equal copies."""
        rows, columns = held(self.checkpoint.config, weight, rank)
        part = self.checkpoint.mapped(self.checkpoint.file_of(weight, rank)).T
        place = whole[:, columns.start : columns.stop] if weight.is_linear else whole
        start = 0
        for row in rows:
            place[row.start : row.stop] = part[start : start + len(row)]
            start += len(row)
