"""Linear layers with integer weights that were rounded to nearest: int8 and int4 weight-only.

Integers and scales are those of FT's weight-only layers before the permutation for a particular
GPU: scale = amax / 128 or amax / 8, and the largest weight saturates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import linear_name
from mpt_trt.model.sharding import Rank, all_ranks
from mpt_trt.model.tensors import Split, Weight
from mpt_trt.network.graph import GraphBuilder, StoredTensor
from mpt_trt.network.linear.base import computed, dequantized, with_quantized_matrices
from mpt_trt.network.linear.specs import QUANTIZED_MATRIX, SCALE, TensorSpec, layer_specs
from mpt_trt.quantization import integers
from mpt_trt.quantization.schemes import Quantization, WeightOnly, require_fitting_groups


class WeightOnlyLinear:
    """Implements `LinearLayers` for weight-only integers.

    Raises MptTrtError when groups do not fit the ranks.
    """

    def __init__(self, checkpoint: FtCheckpoint, rank: Rank, scheme: WeightOnly):
        if scheme.group_size is not None:
            require_fitting_groups(checkpoint.config, rank.tp_size, scheme.group_size)
        self._checkpoint, self._rank, self._scheme = checkpoint, rank, scheme

    def tensors(self) -> dict[str, StoredTensor]:
        return with_quantized_matrices(
            self._checkpoint, self._rank, lambda weight: self._matrix(weight).tensors()
        )

    def emit(self, graph: GraphBuilder, weight: Weight, value: str) -> str:
        name = linear_name(weight)
        matrix = dequantized(graph, name, **self._matrix(weight).attributes)
        return graph.node("MatMul", [value, matrix], name)

    def _matrix(self, weight: Weight) -> _Matrix:
        return _Matrix(self._checkpoint, weight, self._rank, self._scheme)


@dataclass(frozen=True)
class _Matrix:
    """A rank's part of a matrix, `[in_features, out_features]`."""

    checkpoint: FtCheckpoint
    weight: Weight
    rank: Rank
    scheme: WeightOnly

    @functools.cached_property
    def specs(self) -> dict[str, TensorSpec]:
        config, dtype = self.checkpoint.config, self.checkpoint.storage_type
        return layer_specs(config, self.weight, self.rank, dtype, Quantization(self.scheme))

    @property
    def attributes(self) -> dict[str, int]:
        """Attributes of the DequantizeLinear node."""
        height, scales = self.specs[QUANTIZED_MATRIX].shape[0], self.specs[SCALE].shape
        if len(scales) == 1:
            return {"axis": 1}
        return {"axis": 0, "block_size": height // scales[0]}

    def tensors(self) -> dict[str, StoredTensor]:
        name, rank = self.weight.name, self.rank.index
        integers, scales = self.specs[QUANTIZED_MATRIX], self.specs[SCALE]
        return {
            QUANTIZED_MATRIX: computed(f"{name}.{integers.dtype}.{rank}", integers, self._integers),
            SCALE: computed(f"{name}.scale.{rank}", scales, self._scales),
        }

    @functools.cached_property
    def _unrounded_scales(self) -> NDArray[np.float32]:
        """Computes scales, float32 `[groups, out_features]`, with one group for whole columns."""
        if self.scheme.group_size is not None:
            amax = integers.group_amax(self._content(self.rank), self.scheme.group_size)
        else:
            amax = self._column_amax()[None]
        return amax / np.float32(1 << (self.scheme.bits - 1))

    def _column_amax(self) -> NDArray[np.float32]:
        # Each column of a row-split matrix is on all ranks.
        is_spread = self.weight.split is Split.ROWS
        ranks = all_ranks(self.rank.tp_size) if is_spread else [self.rank]
        return np.max([integers.column_amax(self._content(rank)) for rank in ranks], axis=0)

    def _content(self, rank: Rank) -> NDArray:
        return self.checkpoint.matrix(self.weight, rank)

    def _integers(self) -> Iterator[NDArray]:
        bits = self.scheme.bits
        rows = integers.quantize(self._content(self.rank), self._unrounded_scales, bits)
        return rows if bits == 8 else integers.packed(rows)

    def _scales(self) -> Iterator[NDArray]:
        dtype = STORAGE_TYPES[self.checkpoint.storage_type]
        scales = integers.stored_scales(self._unrounded_scales, dtype)
        shape = self.specs[SCALE].shape
        if len(shape) == 2:
            # The scale of a whole column is stored once for each of its blocks.
            scales = np.repeat(scales, shape[0] // len(scales), axis=0)
        yield np.ascontiguousarray(scales)
