"""Products with integer weights that were rounded to nearest: int8 and int4 weight-only.

Integers and scales are those of FT's weight-only layers (ft_checkpoint, section 5) before the
permutation for a certain GPU: scale = amax / 128 or amax / 8, and the largest weight saturates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.sharding import Rank, all_ranks
from mpt_trt.model.tensors import Split, Weight
from mpt_trt.network.graph import ELEMENT_TYPES, GraphBuilder, StoredTensor
from mpt_trt.network.linear.base import dequantized, ft_tensors, linear_weights, made
from mpt_trt.quantization import integers
from mpt_trt.quantization.schemes import WeightOnly, require_fitting_groups, scale_block


class WeightOnlyLinear:
    """See `LinearLayers`.

    Raises MptTrtError when groups do not fit the ranks.
    """

    def __init__(self, checkpoint: FtCheckpoint, rank: Rank, scheme: WeightOnly):
        if scheme.group_size is not None:
            require_fitting_groups(checkpoint.config, rank.tp_size, scheme.group_size)
        self._checkpoint, self._rank = checkpoint, rank
        self._matrices = {
            name: _Matrix(checkpoint, weight, rank, scheme)
            for name, weight in linear_weights(checkpoint.config).items()
        }

    def tensors(self) -> dict[str, StoredTensor]:
        found = ft_tensors(self._checkpoint, self._rank)
        for name, matrix in self._matrices.items():
            del found[f"{name}.weight"]
            found |= matrix.tensors(f"{name}.weight")
        return found

    def emit(self, graph: GraphBuilder, name: str, value: str) -> str:
        weight = dequantized(graph, name, **self._matrices[name].attributes)
        return graph.node("MatMul", [value, weight], name)


@dataclass(frozen=True)
class _Matrix:
    """One rank's part of a matrix, `[in_features, out_features]`."""

    checkpoint: FtCheckpoint
    weight: Weight
    rank: Rank
    scheme: WeightOnly

    @property
    def shape(self) -> tuple[int, ...]:
        return self.checkpoint.file_of(self.weight, self.rank).shape

    @property
    def block_size(self) -> int | None:
        """Rows that share a stored scale; None: all of a column."""
        return scale_block(self.scheme, self.shape[0])

    @property
    def attributes(self) -> dict[str, int]:
        """Of DequantizeLinear."""
        if self.block_size is None:
            return {"axis": 1}
        return {"axis": 0, "block_size": self.block_size}

    def tensors(self, name: str) -> dict[str, StoredTensor]:
        rank = self.rank.index
        integer = TensorProto.INT8 if self.scheme.bits == 8 else TensorProto.INT4
        scale = ELEMENT_TYPES[self.checkpoint.storage_type]
        height, width = self.shape
        blocks = () if self.block_size is None else (height // self.block_size,)
        return {
            f"{name}.quantized": made(
                f"{name}.int{self.scheme.bits}.{rank}", integer, self.shape, self._integers
            ),
            f"{name}.scale": made(f"{name}.scale.{rank}", scale, (*blocks, width), self._scales),
        }

    @functools.cached_property
    def _unrounded_scales(self) -> NDArray[np.float32]:
        """float32 `[groups, out_features]`; one group where a scale is for a whole column."""
        if self.scheme.group_size is not None:
            amax = integers.group_amax(self._content(self.rank), self.scheme.group_size)
        else:
            amax = self._column_amax()[None]
        return amax / np.float32(1 << (self.scheme.bits - 1))

    def _column_amax(self) -> NDArray[np.float32]:
        # A row-split matrix has each column on all ranks.
        is_spread = self.weight.split is Split.ROWS
        ranks = all_ranks(self.rank.tp_size) if is_spread else [self.rank]
        return np.max([integers.column_amax(self._content(rank)) for rank in ranks], axis=0)

    def _content(self, rank: Rank) -> NDArray:
        return self.checkpoint.matrix(self.weight, rank)

    def _integers(self) -> Iterator[NDArray]:
        bits = self.scheme.bits
        found = integers.quantize(self._content(self.rank), self._unrounded_scales, bits)
        return found if bits == 8 else integers.packed(found)

    def _scales(self) -> Iterator[NDArray]:
        dtype = STORAGE_TYPES[self.checkpoint.storage_type]
        scales = integers.stored_scales(self._unrounded_scales, dtype)
        if self.block_size is not None:
            blocks = self.shape[0] // self.block_size
            scales = np.repeat(scales, blocks // len(scales), axis=0)
        yield np.ascontiguousarray(scales)
