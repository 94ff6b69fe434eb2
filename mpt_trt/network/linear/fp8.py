"""Linear layers with E4M3 weights and activations, each with one calibrated scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from mpt_trt.calibration.result import CalibrationResult
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import linear_name
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import Weight
from mpt_trt.network.graph import GraphBuilder, StoredTensor
from mpt_trt.network.linear.base import computed, with_quantized_matrices
from mpt_trt.network.linear.specs import INPUT_SCALE, QUANTIZED_MATRIX, SCALE, layer_specs
from mpt_trt.quantization.fp8 import quantized_block
from mpt_trt.quantization.integers import row_blocks
from mpt_trt.quantization.schemes import Fp8, Quantization


@dataclass(frozen=True)
class Fp8Linear:
    """Implements `LinearLayers` for fp8."""

    checkpoint: FtCheckpoint
    rank: Rank
    calibration: CalibrationResult

    def tensors(self) -> dict[str, StoredTensor]:
        return with_quantized_matrices(
            self.checkpoint, self.rank, lambda weight: {QUANTIZED_MATRIX: self._stored(weight)}
        )

    def emit(self, graph: GraphBuilder, weight: Weight, value: str) -> str:
        name = linear_name(weight)
        scales = self.calibration.fp8_scales(*weight.place)
        to_float = {"output_dtype": graph.element_type}
        # float32, because a float16 scale would make ONNX Runtime divide in float16.
        scale = graph.constant(f"{name}.{INPUT_SCALE}", scales.activation or 1.0, np.float32)
        value = graph.node(
            "QuantizeLinear",
            [value, scale],
            f"{name}/quantized_input",
            output_dtype=TensorProto.FLOAT8E4M3FN,
        )
        value = graph.node("DequantizeLinear", [value, scale], f"{name}/input", **to_float)
        stored = graph.weight(f"{name}.{QUANTIZED_MATRIX}")
        scale = graph.constant(f"{name}.{SCALE}", scales.weight or 1.0, np.float32)
        matrix = graph.node("DequantizeLinear", [stored, scale], f"{name}/weight", **to_float)
        return graph.node("MatMul", [value, matrix], name)

    def _stored(self, weight: Weight) -> StoredTensor:
        config, dtype = self.checkpoint.config, self.checkpoint.storage_type
        specs = layer_specs(config, weight, self.rank, dtype, Quantization(Fp8()))

        def pieces() -> Iterator[NDArray]:
            scale = self.calibration.fp8_scales(*weight.place).weight or 1.0
            for block in row_blocks(self.checkpoint.matrix(weight, self.rank)):
                yield quantized_block(np.ascontiguousarray(block), scale)

        file_name = f"{weight.name}.fp8.{self.rank.index}"
        return computed(file_name, specs[QUANTIZED_MATRIX], pieces)
