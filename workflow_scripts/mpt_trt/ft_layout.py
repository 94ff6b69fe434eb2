"""Which files an FT checkpoint has, and which part of a tensor each holds: pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpt_trt import sharding
from mpt_trt.config import MptConfig
from mpt_trt.sharding import Range, Shard
from mpt_trt.weight_map import Split, Weight, weights

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class FtFile:
    """One `.bin` file. shard is None for a tensor that all ranks read from one file."""

    weight: Weight
    shard: Shard | None
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        rank = "" if self.shard is None else f".{self.shard.rank}"
        return f"model.{self.weight.name}{rank}.bin"

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def byte_size(self, dtype: np.dtype) -> int:
        return self.num_elements * dtype.itemsize


def ft_file(config: MptConfig, weight: Weight, shard: Shard) -> FtFile:
    """The file from which rank `shard.rank` reads `weight`."""
    if weight.split is Split.WHOLE:
        return FtFile(weight, None, weight.shape)
    rows, columns = held(config, weight, shard)
    out_features = sum(map(len, rows))
    shape = (len(columns), out_features) if weight.is_linear else (out_features,)
    return FtFile(weight, shard, shape)


def ft_files(config: MptConfig, tp_size: int) -> list[FtFile]:
    """Every `.bin` file of a directory for tp_size ranks."""
    return [file for weight in weights(config) for file in files_of(config, weight, tp_size)]


def files_of(config: MptConfig, weight: Weight, tp_size: int) -> list[FtFile]:
    """The files of one tensor: one for all ranks, or one a rank."""
    if weight.split is Split.WHOLE:
        return [FtFile(weight, None, weight.shape)]
    return [ft_file(config, weight, shard) for shard in sharding.shards(tp_size)]


def held(config: MptConfig, weight: Weight, shard: Shard) -> tuple[list[Range], Range]:
    """Rows and columns of the Hugging Face tensor `[out, in]` (or `[out]`) that a rank holds."""
    every_input = Range(0, weight.shape[-1])
    if weight.split is Split.QKV:
        return list(sharding.qkv_columns(config, shard)), every_input
    if weight.split is Split.COLUMNS:
        return [sharding.feed_forward_columns(config, shard)], every_input
    return [Range(0, weight.shape[0])], shard.part(weight.shape[1])
