"""Products of E4M3 weights and E4M3 activations, each with one calibrated scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from mpt_trt.calibration.result import CalibrationResult
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import Weight
from mpt_trt.network.graph import GraphBuilder, StoredTensor
from mpt_trt.network.linear.base import ft_tensors, linear_weights, made, place
from mpt_trt.quantization.fp8 import quantized_block
from mpt_trt.quantization.integers import row_blocks


@dataclass(frozen=True)
class Fp8Linear:
    """See `LinearLayers`."""

    checkpoint: FtCheckpoint
    rank: Rank
    calibration: CalibrationResult

    def tensors(self) -> dict[str, StoredTensor]:
        found = ft_tensors(self.checkpoint, self.rank)
        for name, weight in linear_weights(self.checkpoint.config).items():
            del found[weight.name]
            found[f"{weight.name}.quantized"] = self._stored(name, weight)
        return found

    def emit(self, graph: GraphBuilder, name: str, value: str) -> str:
        scales = self.calibration.fp8_scales(*place(name))
        to_float = {"output_dtype": graph.element_type}
        # In float32: a float16 scale would make ONNX Runtime divide in float16.
        scale = graph.constant(f"{name}.input_scale", scales.activation or 1.0, np.float32)
        value = graph.node(
            "QuantizeLinear",
            [value, scale],
            f"{name}/quantized_input",
            output_dtype=TensorProto.FLOAT8E4M3FN,
        )
        value = graph.node("DequantizeLinear", [value, scale], f"{name}/input", **to_float)
        stored = graph.weight(f"{name}.weight.quantized")
        scale = graph.constant(f"{name}.weight.scale", scales.weight or 1.0, np.float32)
        weight = graph.node("DequantizeLinear", [stored, scale], f"{name}/weight", **to_float)
        return graph.node("MatMul", [value, weight], name)

    def _stored(self, name: str, weight: Weight) -> StoredTensor:
        shape = self.checkpoint.file_of(weight, self.rank).shape

        def pieces() -> Iterator[NDArray]:
            scale = self.calibration.fp8_scales(*place(name)).weight or 1.0
            for block in row_blocks(self.checkpoint.matrix(weight, self.rank)):
                yield quantized_block(np.ascontiguousarray(block), scale)

        file_name = f"{weight.name}.fp8.{self.rank.index}"
        return made(file_name, TensorProto.FLOAT8E4M3FN, shape, pieces)
