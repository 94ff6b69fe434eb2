"""Linear layers with integers that GPTQ has rounded: int4 in groups, or int8.

The integers are those of the calibration result. A negative scale turns a group's grid around, so
that -8 stands for its largest positive weight; both runtimes multiply by it like by any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES, convert
from mpt_trt.calibration.result import CalibrationResult
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import held, linear_name
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import Weight, block_matrices
from mpt_trt.network.graph import GraphBuilder, StoredTensor
from mpt_trt.network.linear.base import computed, dequantized, with_quantized_matrices
from mpt_trt.network.linear.int4_groups import Int4Groups, require_group_size
from mpt_trt.network.linear.specs import QUANTIZED_MATRIX, SCALE, integer_specs
from mpt_trt.quantization.integers import FLOAT32, stored_scales
from mpt_trt.quantization.schemes import IntegerFormat


class GptqLinear:
    """Implements `LinearLayers` for GPTQ.

    Raises MptTrtError when the calibration's groups do not fit the ranks.
    """

    def __init__(self, checkpoint: FtCheckpoint, rank: Rank, calibration: CalibrationResult):
        self._checkpoint, self._rank, self._calibration = checkpoint, rank, calibration
        for layer in range(checkpoint.config.num_layers):
            for matrix in block_matrices(checkpoint.config, layer):
                if (size := calibration.integer_format(layer, matrix).group_size) is not None:
                    require_group_size(calibration, checkpoint.config, rank, size)
        self._groups = Int4Groups(checkpoint.config, rank, calibration)

    def tensors(self) -> dict[str, StoredTensor]:
        return with_quantized_matrices(self._checkpoint, self._rank, self._stored)

    def emit(self, graph: GraphBuilder, weight: Weight, value: str) -> str:
        name, size = linear_name(weight), self._format(weight).group_size
        place = {"axis": 1} if size is None else {"axis": 0, "block_size": size}
        matrix = dequantized(graph, name, **place)
        return graph.node("MatMul", [value, matrix], name)

    def _format(self, weight: Weight) -> IntegerFormat:
        return self._calibration.integer_format(*weight.place)

    def _stored(self, weight: Weight) -> dict[str, StoredTensor]:
        config, dtype = self._checkpoint.config, self._checkpoint.storage_type
        form, name, rank = self._format(weight), weight.name, self._rank.index
        specs = integer_specs(config, weight, self._rank, dtype, form)
        read = self._groups.packed_integers if form.bits == 4 else self._bytes
        integers, scales = partial(read, weight), partial(self._scales, weight)
        file_name = f"{name}.{specs[QUANTIZED_MATRIX].dtype}.{rank}"
        return {
            QUANTIZED_MATRIX: computed(file_name, specs[QUANTIZED_MATRIX], integers),
            SCALE: computed(f"{name}.scale.{rank}", specs[SCALE], scales),
        }

    def _bytes(self, weight: Weight) -> Iterator[NDArray[np.int8]]:
        """Yields int8 `[in, out]`."""
        rows, columns = held(self._checkpoint.config, weight, self._rank)
        whole, scales = self._calibration.rounded_matrix(*weight.place)
        parts = [
            convert(np.ascontiguousarray(whole[part.start : part.stop]), FLOAT32)
            / scales[part.start : part.stop]
            for part in rows
        ]
        quotients = np.concatenate(parts)[:, columns.start : columns.stop]
        integers = np.rint(quotients).clip(-128, 127).astype(np.int8)
        yield np.ascontiguousarray(integers.T)

    def _scales(self, weight: Weight) -> Iterator[NDArray]:
        dtype = STORAGE_TYPES[self._checkpoint.storage_type]
        if self._format(weight).bits == 4:
            yield stored_scales(self._groups.scales(weight), dtype)
            return
        rows, _ = held(self._checkpoint.config, weight, self._rank)
        whole = self._calibration.group_scales(*weight.place)[:, 0]
        scales = np.concatenate([whole[part.start : part.stop] for part in rows])
        yield stored_scales(scales, dtype)
