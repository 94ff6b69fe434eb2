"""Linear layers with 4-bit weights in groups, after activation-aware scaling (AWQ).

The weights of a layer are divided by its pre-quant scale, and its input is multiplied by it. If the
input comes from a norm, the norm's weight and bias absorb the factor. If it is the output of
attention, V's columns absorb it, provided that each has one use and nothing is in between.
Otherwise, as after GELU, the network has a node that multiplies.

The integers are round(weight / scale) in -8..7 with scale = amax / 7, as in ModelOpt's fake
quantization. (TensorRT-LLM's 2023 loader recomputed amax / 8 from the same npz, which saturates the
largest positive weight of a group.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES, convert
from mpt_trt.calibration.result import CalibrationResult
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import held, linear_name
from mpt_trt.model import sharding
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import BlockMatrices, BlockMatrix, Weight, block_matrices, preceding_norm
from mpt_trt.network.graph import GraphBuilder, StoredTensor
from mpt_trt.network.linear.base import (
    computed,
    dequantized,
    ft_tensors,
    named_by_layer,
    scaled_input,
)
from mpt_trt.network.linear.int4_groups import Int4Groups, require_group_size
from mpt_trt.network.linear.specs import (
    PRE_QUANT_SCALE,
    QUANTIZED_MATRIX,
    SCALE,
    TensorSpec,
    layer_specs,
)
from mpt_trt.quantization import integers
from mpt_trt.quantization.integers import FLOAT32
from mpt_trt.quantization.schemes import (
    Awq,
    KvCacheType,
    Quantization,
    folds_into_values,
)

Factor = Callable[[], NDArray[np.float32]]
"""Function that reads a vector from the calibration result when a file is written."""


class AwqLinear:
    """Implements `LinearLayers` for AWQ.

    Raises MptTrtError when the calibration's groups do not fit the ranks.
    """

    def __init__(
        self,
        checkpoint: FtCheckpoint,
        rank: Rank,
        calibration: CalibrationResult,
        kv_cache: KvCacheType,
    ):
        config = checkpoint.config
        group_size = calibration.required_group_size
        require_group_size(calibration, config, rank, group_size)
        self._checkpoint, self._rank, self._calibration = checkpoint, rank, calibration
        self._group_size = group_size
        self._groups = Int4Groups(checkpoint.config, rank, calibration)
        self._quantization = Quantization(Awq(group_size), kv_cache)
        self._folds_into_values = folds_into_values(config, kv_cache)

    def tensors(self) -> dict[str, StoredTensor]:
        tensors = ft_tensors(self._checkpoint, self._rank)
        for layer in range(self._checkpoint.config.num_layers):
            matrices = block_matrices(self._checkpoint.config, layer)
            for weight in matrices.values():
                del tensors[weight.name]
                tensors |= named_by_layer(weight, self._stored(weight, matrices))
            tensors |= self._scaled_norms(matrices, tensors)
            tensors |= self._scaled_value_bias(matrices, tensors)
        return tensors

    def emit(self, graph: GraphBuilder, weight: Weight, value: str) -> str:
        name = linear_name(weight)
        value = scaled_input(graph, name, value)
        matrix = dequantized(graph, name, axis=0, block_size=self._group_size)
        return graph.node("MatMul", [value, matrix], name)

    def _stored(self, weight: Weight, matrices: BlockMatrices) -> dict[str, StoredTensor]:
        """Tensors of a layer, by name relative to the layer."""
        specs = layer_specs(
            self._checkpoint.config,
            weight,
            self._rank,
            self._checkpoint.storage_type,
            self._quantization,
        )
        contents = {
            QUANTIZED_MATRIX: (
                f"{weight.name}.int4",
                partial(self._groups.packed_integers, weight),
            ),
            SCALE: (f"{weight.name}.scale", partial(self._scales, weight, matrices)),
            PRE_QUANT_SCALE: (
                f"{linear_name(weight)}.{PRE_QUANT_SCALE}",
                partial(self._stored_pre_quant_scale, weight),
            ),
        }
        return {
            key: computed(f"{name}.{self._rank.index}", specs[key], pieces)
            for key, (name, pieces) in contents.items()
            if key in specs
        }

    def _scales(self, weight: Weight, matrices: BlockMatrices) -> Iterator[NDArray]:
        scales = self._groups.scales(weight)
        if weight.matrix is BlockMatrix.QKV and self._folds_into_values:
            scales = scales * self._factor_of_qkv(matrices[BlockMatrix.OUTPUT])
        dtype = STORAGE_TYPES[self._checkpoint.storage_type]
        yield integers.stored_scales(scales.astype(np.float32), dtype)

    def _stored_pre_quant_scale(self, weight: Weight) -> Iterator[NDArray]:
        dtype = STORAGE_TYPES[self._checkpoint.storage_type]
        yield convert(self._pre_quant_scale(weight), dtype)

    def _scaled_norms(
        self, matrices: BlockMatrices, tensors: dict[str, StoredTensor]
    ) -> dict[str, StoredTensor]:
        """Weights and biases of a block's norms, times the scale of the layer after each."""
        scaled = {}
        for weight in matrices.values():
            if (norm := preceding_norm(weight)) is None:
                continue
            factor = partial(self._pre_quant_scale, weight)
            for name in (f"{norm}.weight", f"{norm}.bias"):
                if name in tensors:
                    scaled[name] = self._times(tensors[name], name, factor)
        return scaled

    def _scaled_value_bias(
        self, matrices: BlockMatrices, tensors: dict[str, StoredTensor]
    ) -> dict[str, StoredTensor]:
        """Bias of QKV, if V's columns have absorbed the scale of attention's output."""
        bias = f"{linear_name(matrices[BlockMatrix.QKV])}.bias"
        if bias not in tensors or not self._folds_into_values:
            return {}
        factor = partial(self._factor_of_qkv, matrices[BlockMatrix.OUTPUT])
        return {bias: self._times(tensors[bias], f"{bias}.{self._rank.index}", factor)}

    def _times(self, stored: StoredTensor, name: str, factor: Factor) -> StoredTensor:
        """Makes a tensor of a one-dimensional FT file times a vector."""
        storage_type = self._checkpoint.storage_type
        path = stored.content
        assert isinstance(path, Path)

        def pieces() -> Iterator[NDArray]:
            dtype = STORAGE_TYPES[storage_type]
            values = convert(np.fromfile(path, dtype), FLOAT32)
            yield convert(values * factor(), dtype)

        return computed(f"{name}.scaled", TensorSpec(storage_type, stored.shape), pieces)

    def _pre_quant_scale(self, weight: Weight) -> NDArray[np.float32]:
        """Reads the rank's part of a pre-quant scale, float32 `[in_features]`."""
        _, columns = held(self._checkpoint.config, weight, self._rank)
        whole = self._calibration.pre_quant_scale(*weight.place)
        return whole[columns.start : columns.stop]

    def _factor_of_qkv(self, output: Weight) -> NDArray[np.float32]:
        """Factors of the rank's QKV columns: 1 for Q and K, attention's output scale for V."""
        query, key, _ = sharding.qkv_columns(self._checkpoint.config, self._rank)
        ones = np.ones(len(query) + len(key), np.float32)
        return np.concatenate([ones, self._pre_quant_scale(output)])
