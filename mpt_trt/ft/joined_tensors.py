"""Whole tensors of an FT checkpoint, re-joined from the files of its ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import FtFile, held
from mpt_trt.model.sharding import Rank, all_ranks
from mpt_trt.model.tensors import Weight


@dataclass(frozen=True)
class FtTensors:
    """Tensors as Hugging Face stores them: `[out_features, in_features]`."""

    checkpoint: FtCheckpoint

    def tensor(self, weight: Weight) -> NDArray:
        """The whole tensor, `weight.shape`, in the checkpoint's storage type."""
        files = [self.checkpoint.file_of(weight, s) for s in all_ranks(self.checkpoint.tp_size)]
        if files[0].rank is None:
            return self.checkpoint.mapped(files[0])
        whole = np.empty(weight.shape, STORAGE_TYPES[self.checkpoint.storage_type])
        for file in files:
            self._fill_part(whole, file)
        return whole

    def corner(self, weight: Weight, size: tuple[int, ...]) -> NDArray:
        """The first rows and columns of a tensor, as many of `size` as the first rank's file has.

        Reads nothing else.
        """
        file = self.checkpoint.file_of(weight, Rank(0, self.checkpoint.tp_size))
        stored = self.checkpoint.mapped(file)
        if file.rank is None:
            return stored[tuple(map(slice, size))]
        rows, _ = held(self.checkpoint.config, weight, file.rank)
        height = min(len(rows[0]), size[0])
        return stored.T[(slice(height), *map(slice, size[1:]))]

    def _fill_part(self, whole: NDArray, file: FtFile) -> None:
        """Copies what one rank holds to its place; ranks that replicate K/V heads agree on it."""
        rows, columns = held(self.checkpoint.config, file.weight, file.rank)
        part = self.checkpoint.mapped(file).T
        place = whole[:, columns.start : columns.stop] if file.weight.is_linear else whole
        start = 0
        for row in rows:
            place[row.start : row.stop] = part[start : start + len(row)]
            start += len(row)
