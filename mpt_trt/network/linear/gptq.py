"""Linear layers with 4-bit weights in groups that GPTQ has rounded.

The integers are those of the calibration result. A negative scale turns a group's grid around, so
that -8 stands for its largest positive weight; both runtimes multiply by it like by any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.calibration.result import CalibrationResult
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import linear_name
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import Weight
from mpt_trt.network.graph import GraphBuilder, StoredTensor
from mpt_trt.network.linear.base import computed, dequantized, with_quantized_matrices
from mpt_trt.network.linear.int4_groups import Int4Groups, require_group_size
from mpt_trt.network.linear.specs import QUANTIZED_MATRIX, SCALE, layer_specs
from mpt_trt.quantization.integers import stored_scales
from mpt_trt.quantization.schemes import Gptq, Quantization


class GptqLinear:
    """See `LinearLayers`.

    Raises MptTrtError when the calibration's groups do not fit the ranks.
    """

    def __init__(self, checkpoint: FtCheckpoint, rank: Rank, calibration: CalibrationResult):
        self._checkpoint, self._rank = checkpoint, rank
        self._group_size = require_group_size(calibration, checkpoint.config, rank)
        self._groups = Int4Groups(checkpoint.config, rank, calibration)

    def tensors(self) -> dict[str, StoredTensor]:
        return with_quantized_matrices(self._checkpoint, self._rank, self._stored)

    def emit(self, graph: GraphBuilder, weight: Weight, value: str) -> str:
        name = linear_name(weight)
        matrix = dequantized(graph, name, axis=0, block_size=self._group_size)
        return graph.node("MatMul", [value, matrix], name)

    def _stored(self, weight: Weight) -> dict[str, StoredTensor]:
        config, dtype = self._checkpoint.config, self._checkpoint.storage_type
        specs = layer_specs(config, weight, self._rank, dtype, Quantization(Gptq(self._group_size)))
        name, rank = weight.name, self._rank.index
        integers = partial(self._groups.packed_integers, weight)
        scales = partial(self._scales, weight)
        return {
            QUANTIZED_MATRIX: computed(f"{name}.int4.{rank}", specs[QUANTIZED_MATRIX], integers),
            SCALE: computed(f"{name}.scale.{rank}", specs[SCALE], scales),
        }

    def _scales(self, weight: Weight) -> Iterator[NDArray]:
        dtype = STORAGE_TYPES[self._checkpoint.storage_type]
        yield stored_scales(self._groups.scales(weight), dtype)
