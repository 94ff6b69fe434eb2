"""Products with 4-bit weights in groups, after activation-aware scaling (AWQ).

A product's input is multiplied by the pre-quant scale of its layer, by which the weights have been
divided. Where the input comes from a norm, the norm's weight and bias take the factor; where it is
the attention's output, V's columns do, if each has one use and nothing lies between; only before
the last matrix of a block, behind GELU, does a node of the network multiply.

Integers: round(weight / scale) in -8..7 with scale = amax / 7, as ModelOpt's own fake quantization
has them. (TensorRT-LLM's 2023 loader recomputed amax / 8 from the same npz, where the largest
positive weight of a group saturates.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from mpt_trt.arrays.cast import STORAGE_TYPES, convert, transposed_copy
from mpt_trt.calibration.rank_blocks import BLOCK_ROWS, held_blocks
from mpt_trt.calibration.result import CalibrationResult
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import held
from mpt_trt.model import sharding
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import Weight, preceding_norm
from mpt_trt.network.graph import ELEMENT_TYPES, GraphBuilder, StoredTensor
from mpt_trt.network.linear.base import (
    dequantized,
    ft_tensors,
    linear_weights,
    made,
    place,
    scaled_input,
)
from mpt_trt.quantization import integers
from mpt_trt.quantization.awq import quantized_rows
from mpt_trt.quantization.integers import BLOCK_ELEMENTS, FLOAT32
from mpt_trt.quantization.schemes import KvCacheType, folds_into_values, require_fitting_groups

QKV, DENSE = "attention.query_key_value", "attention.dense"

Factor = Callable[[], NDArray[np.float32]]
"""A vector that is read from the calibration result when a file is written."""


class AwqLinear:
    """See `LinearLayers`.

    Raises MptTrtError when the calibration's groups do not fit the ranks.
    """

    def __init__(
        self,
        checkpoint: FtCheckpoint,
        rank: Rank,
        calibration: CalibrationResult,
        kv_cache: KvCacheType,
    ):
        config, group_size = checkpoint.config, calibration.group_size
        if group_size is None:
            raise ValueError(f"{calibration.path}: no result of int4_awq")
        if group_size % 2:
            raise calibration.file.refused(f"groups of {group_size} are not of an even size")
        try:
            require_fitting_groups(config, rank.tp_size, group_size)
        except MptTrtError as error:
            raise MptTrtError(f"{calibration.path}: {error}") from None
        self._checkpoint, self._rank, self._calibration = checkpoint, rank, calibration
        self._group_size = group_size
        self._weights = linear_weights(config)
        self._folds_into_values = folds_into_values(config, kv_cache)

    def tensors(self) -> dict[str, StoredTensor]:
        found = ft_tensors(self._checkpoint, self._rank)
        for name, weight in self._weights.items():
            del found[weight.name]
            found |= self._matrix(name, weight)
            found |= self._takers_of_scale(name, weight, found)
        return found

    def emit(self, graph: GraphBuilder, name: str, value: str) -> str:
        value = scaled_input(graph, name, value)
        weight = dequantized(graph, name, axis=0, block_size=self._group_size)
        return graph.node("MatMul", [value, weight], name)

    def _matrix(self, name: str, weight: Weight) -> dict[str, StoredTensor]:
        rank = self._rank.index
        height, width = self._checkpoint.file_of(weight, self._rank).shape
        element_type = ELEMENT_TYPES[self._checkpoint.storage_type]
        return {
            f"{weight.name}.quantized": made(
                f"{weight.name}.int4.{rank}",
                TensorProto.INT4,
                (height, width),
                functools.partial(self._integers, name, weight),
            ),
            f"{weight.name}.scale": made(
                f"{weight.name}.scale.{rank}",
                element_type,
                (height // self._group_size, width),
                functools.partial(self._scales, name, weight),
            ),
        }

    def _integers(self, name: str, weight: Weight) -> Iterator[NDArray]:
        rows, columns = held(self._checkpoint.config, weight, self._rank)
        packed = np.empty((len(columns), sum(map(len, rows)) // 2), np.uint8)
        start = 0
        for block, scales in held_blocks(self._calibration, *place(name), rows, columns):
            stop = start + len(block) // 2
            _quantize_into(packed[:, start:stop], block, scales)
            start = stop
        yield packed

    def _scales(self, name: str, weight: Weight) -> Iterator[NDArray]:
        rows, columns = held(self._checkpoint.config, weight, self._rank)
        groups = self._groups(columns)
        whole = self._calibration.awq_scales(*place(name))
        found = np.concatenate([whole[part.start : part.stop, groups] for part in rows]).T
        if name.endswith(QKV) and self._folds_into_values:
            found = found * self._factor_of_qkv(name.replace(QKV, DENSE))
        dtype = STORAGE_TYPES[self._checkpoint.storage_type]
        yield integers.stored_scales(np.ascontiguousarray(found, np.float32), dtype)

    def _groups(self, columns: sharding.Range) -> slice:
        return slice(columns.start // self._group_size, columns.stop // self._group_size)

    def _takers_of_scale(
        self, name: str, weight: Weight, found: dict[str, StoredTensor]
    ) -> dict[str, StoredTensor]:
        """The tensors that take the pre-quant scale of layer `name`; found: those before it."""
        if (norm := preceding_norm(weight)) is not None:
            factor = functools.partial(self._pre_quant_scale, name)
            parts = [f"{norm}.{part}" for part in ("weight", "bias") if f"{norm}.{part}" in found]
            return {part: self._times(found[part], part, factor) for part in parts}
        if not (name.endswith(DENSE) and self._folds_into_values):
            return {f"{name}.pre_quant_scale": self._stored_scale(name, weight)}
        bias = f"{name.replace(DENSE, QKV)}.bias"
        if bias not in found:
            return {}
        factor = functools.partial(self._factor_of_qkv, name)
        return {bias: self._times(found[bias], f"{bias}.{self._rank.index}", factor)}

    def _times(self, stored: StoredTensor, name: str, factor: Factor) -> StoredTensor:
        """An FT file of one dimension, times a vector."""
        dtype = STORAGE_TYPES[self._checkpoint.storage_type]

        def pieces() -> Iterator[NDArray]:
            values = convert(np.fromfile(stored.content, dtype), FLOAT32)
            yield convert(values * factor(), dtype)

        return made(f"{name}.scaled", stored.element_type, stored.shape, pieces)

    def _stored_scale(self, name: str, weight: Weight) -> StoredTensor:
        storage_type = self._checkpoint.storage_type

        def pieces() -> Iterator[NDArray]:
            yield convert(self._pre_quant_scale(name), STORAGE_TYPES[storage_type])

        file_name = f"{name}.pre_quant_scale.{self._rank.index}"
        size = self._checkpoint.file_of(weight, self._rank).shape[0]
        return made(file_name, ELEMENT_TYPES[storage_type], (size,), pieces)

    def _pre_quant_scale(self, name: str) -> NDArray[np.float32]:
        """The rank's part, float32 `[in_features]`."""
        _, columns = held(self._checkpoint.config, self._weights[name], self._rank)
        whole = self._calibration.pre_quant_scale(*place(name))
        return whole[columns.start : columns.stop]

    def _factor_of_qkv(self, dense: str) -> NDArray[np.float32]:
        """1 for the rank's columns of Q and K; for those of V, the scale of layer `dense`."""
        query, key, _ = sharding.qkv_columns(self._checkpoint.config, self._rank)
        ones = np.ones(len(query) + len(key), np.float32)
        return np.concatenate([ones, self._pre_quant_scale(dense)])


def _quantize_into(target: NDArray[np.uint8], rows: NDArray, scales: NDArray[np.float32]) -> None:
    """Fills `target` `[in, out / 2]` with the integers of an even number of rows `[out, in]`.

    scales: as in `quantized_rows`. Pairs are packed before they are transposed: half the bytes.
    """
    group_size = rows.shape[1] // scales.shape[1]
    groups = max(1, BLOCK_ELEMENTS // (BLOCK_ROWS * group_size))
    for start in range(0, scales.shape[1], groups):
        part = slice(start * group_size, (start + groups) * group_size)
        integers_of_part = quantized_rows(rows[:, part], scales[:, start : start + groups])
        target[part] = transposed_copy(integers.pack_int4_rows(integers_of_part))
