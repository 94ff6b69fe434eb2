"""Products with 4-bit weights in groups, after activation-aware scaling (AWQ).

A product's input is multiplied by the pre-quant scale of its layer, by which the weights have been
divided. Where the input comes from a norm, the norm's weight and bias take the factor; where it is
the attention's output, V's columns do, if each has one use and nothing lies between; only before
the last matrix of a block, behind GELU, does a node of the network multiply.

Integers: round(weight / scale) in -8..7 with scale = amax / 7, as ModelOpt's own fake quantization
has them. (TensorRT-LLM's 2023 loader recomputed amax / 8 from the same npz; its error is larger
where the largest weight of a group is positive.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from mpt_trt import sharding
from mpt_trt.errors import MptTrtError
from mpt_trt.ft_checkpoint import STORAGE_TYPES, FtCheckpoint
from mpt_trt.ft_layout import held
from mpt_trt.numerics import convert
from mpt_trt.onnx_graph import ELEMENT_TYPES, GraphBuilder, StoredTensor
from mpt_trt.products.base import block_matrices, dequantized, ft_tensors, layer_name, made, place
from mpt_trt.quantization import integers
from mpt_trt.quantization.integers import FLOAT32
from mpt_trt.quantization.npz import AwqMatrix, CalibrationResult
from mpt_trt.quantization.scheme import KvCacheType, require_fitting_groups
from mpt_trt.sharding import Shard
from mpt_trt.weight_map import Weight

QKV, DENSE = "attention.query_key_value", "attention.dense"
UP, DOWN = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
# Which norm's output a matrix multiplies.
NORMS = {QKV: "input_layernorm", UP: "post_attention_layernorm"}


class AwqProducts:
    """See `Products`.

    Raises MptTrtError when the calibration's groups do not fit the ranks.
    """

    def __init__(
        self,
        checkpoint: FtCheckpoint,
        shard: Shard,
        calibration: CalibrationResult,
        kv_cache: KvCacheType,
    ):
        if calibration.group_size is None:
            raise ValueError(f"{calibration.path}: no result of int4_awq")
        try:
            require_fitting_groups(checkpoint.config, shard.tp_size, calibration.group_size)
        except MptTrtError as error:
            raise MptTrtError(f"{calibration.path}: {error}") from None
        self._checkpoint, self._shard, self._calibration = checkpoint, shard, calibration
        config = checkpoint.config
        # A quantized cache's scales, and the clipping, are of V as the model has it.
        self._folds_into_values = (
            config.num_kv_heads == config.num_heads
            and config.clip_qkv is None
            and kv_cache == "auto"
        )

    def tensors(self) -> dict[str, StoredTensor]:
        found = ft_tensors(self._checkpoint, self._shard)
        for weight in block_matrices(self._checkpoint.config):
            name = layer_name(weight)
            del found[weight.name]
            found |= self._matrix(weight).tensors(f"{name}.weight")
            found |= self._scaled(name, found)
        return found

    def emit(self, graph: GraphBuilder, name: str, value: str) -> str:
        if graph.has_weight(f"{name}.pre_quant_scale"):
            scale = graph.weight(f"{name}.pre_quant_scale")
            value = graph.node("Mul", [value, scale], f"{name}/scaled_input")
        weight = dequantized(graph, name, axis=0, block_size=self._calibration.group_size)
        return graph.node("MatMul", [value, weight], name)

    def _matrix(self, weight: Weight) -> _Matrix:
        layer, matrix = place(layer_name(weight))
        is_scaled = matrix == QKV and self._folds_into_values
        dense = (
            functools.partial(self._pre_quant_scale, f"layers.{layer}.{DENSE}")
            if is_scaled
            else None
        )
        return _Matrix(self._checkpoint, weight, self._shard, self._calibration, dense)

    def _scaled(self, name: str, found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The tensors that take the pre-quant scale of layer `name`."""
        layer, matrix = place(name)
        if matrix in NORMS:
            norm = f"layers.{layer}.{NORMS[matrix]}"
            parts = [f"{norm}.{part}" for part in ("weight", "bias") if f"{norm}.{part}" in found]
            scale = functools.partial(self._pre_quant_scale, name)
            return {part: self._times(found[part], part, scale) for part in parts}
        if matrix == DENSE and self._folds_into_values:
            bias = f"layers.{layer}.{QKV}.bias"
            if bias not in found:
                return {}
            scale = functools.partial(self._scale_of_values, name)
            return {bias: self._times(found[bias], f"{bias}.{self._shard.rank}", scale)}
        return {f"{name}.pre_quant_scale": self._stored_scale(name)}

    def _times(self, stored: StoredTensor, name: str, scale) -> StoredTensor:
        """`stored`, an FT file of one dimension, times a vector that is computed when written."""
        dtype = STORAGE_TYPES[self._checkpoint.storage_type]

        def pieces() -> Iterator[NDArray]:
            values = convert(np.fromfile(stored.content, dtype), FLOAT32)
            yield convert(values * scale(), dtype)

        return made(f"{name}.scaled", stored.element_type, stored.shape, pieces)

    def _stored_scale(self, name: str) -> StoredTensor:
        rows = self._input_features(name)
        storage_type = self._checkpoint.storage_type

        def pieces() -> Iterator[NDArray]:
            yield convert(self._pre_quant_scale(name), STORAGE_TYPES[storage_type])

        key = f"{name}.pre_quant_scale.{self._shard.rank}"
        return made(key, ELEMENT_TYPES[storage_type], (len(rows),), pieces)

    def _input_features(self, name: str) -> sharding.Range:
        config = self._checkpoint.config
        weight = next(w for w in block_matrices(config) if layer_name(w) == name)
        return held(config, weight, self._shard)[1]

    def _pre_quant_scale(self, name: str) -> NDArray[np.float32]:
        """The rank's part, float32 `[in_features]`."""
        rows = self._input_features(name)
        whole = self._calibration.awq_matrix(*place(name)).pre_quant_scale
        return whole[rows.start : rows.stop].astype(np.float32)

    def _scale_of_values(self, dense: str) -> NDArray[np.float32]:
        """Factor of each of the rank's QKV columns: 1 for Q and K, that of `dense` for V."""
        return scale_of_values(self._checkpoint, self._shard, self._pre_quant_scale(dense))


def scale_of_values(
    checkpoint: FtCheckpoint, shard: Shard, dense: NDArray[np.float32]
) -> NDArray[np.float32]:
    """float32 `[rank's QKV columns]`; dense: the rank's pre-quant scale, `[V columns]`."""
    query, key, _ = sharding.qkv_columns(checkpoint.config, shard)
    return np.concatenate([np.ones(len(query) + len(key), np.float32), dense])


@dataclass(frozen=True)
class _Matrix:
    """One rank's part of a matrix. dense: the rank's factor of V's columns, for QKV alone."""

    checkpoint: FtCheckpoint
    weight: Weight
    shard: Shard
    calibration: CalibrationResult
    dense: functools.partial | None

    def tensors(self, name: str) -> dict[str, StoredTensor]:
        rank = self.shard.rank
        height, width = self.checkpoint.file_of(self.weight, self.shard).shape
        scale = ELEMENT_TYPES[self.checkpoint.storage_type]
        groups = height // self.calibration.group_size
        return {
            f"{name}.quantized": made(
                f"{name}.int4.{rank}", TensorProto.INT4, (height, width), self._integers
            ),
            f"{name}.scale": made(f"{name}.scale.{rank}", scale, (groups, width), self._scales),
        }

    def _load(self) -> AwqMatrix:
        return self.calibration.awq_matrix(*place(layer_name(self.weight)))

    def _integers(self) -> Iterator[NDArray]:
        group_size = self.calibration.group_size
        rows, columns = held(self.checkpoint.config, self.weight, self.shard)
        whole = self._load()
        first, last = columns.start // group_size, columns.stop // group_size
        parts = []
        for part in rows:
            weight = whole.weight[part.start : part.stop, columns.start : columns.stop]
            scales = whole.scales[part.start : part.stop, first:last]
            parts.append(quantized_rows(weight, scales))
        yield integers.pack_int4(np.ascontiguousarray(np.concatenate(parts).T))

    def _scales(self) -> Iterator[NDArray]:
        group_size = self.calibration.group_size
        rows, columns = held(self.checkpoint.config, self.weight, self.shard)
        first, last = columns.start // group_size, columns.stop // group_size
        whole = self._load().scales
        found = np.concatenate([whole[part.start : part.stop, first:last] for part in rows]).T
        if self.dense is not None:
            found = found * scale_of_values(self.checkpoint, self.shard, self.dense())
        dtype = STORAGE_TYPES[self.checkpoint.storage_type]
        yield integers.stored_scales(np.ascontiguousarray(found, np.float32), dtype)


def quantized_rows(weight: NDArray, scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """round(weight / scale), halves to even, in -8..7.

    weight: `[out_features, in_features]`. scales: `[out_features, in_features / group_size]`.
    """
    safe = np.where(scales == 0, np.float32(1), scales)
    found = np.empty(weight.shape, np.int8)
    for start in range(0, len(weight), 64):
        part = slice(start, start + 64)
        groups = convert(np.ascontiguousarray(weight[part]), FLOAT32)
        groups = groups.reshape(len(groups), safe.shape[1], -1)
        rounded = np.rint(groups / safe[part, :, None])
        found[part] = np.clip(rounded, -8, 7).reshape(len(groups), -1)
    return found
