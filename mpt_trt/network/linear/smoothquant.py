"""Linear layers with 8-bit weights and activations, from a SmoothQuant FT checkpoint.

The integers are the checkpoint's files. A layer's input is divided by its smoother, unless a norm
has absorbed it, and quantized with the calibrated scale or with one scale per token that the
network computes. TensorRT multiplies the integers if it has a kernel for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from mpt_trt.arrays.cast import STORAGE_TYPES, convert
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import FtFile, int8_files, linear_name
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import Weight
from mpt_trt.network.graph import ELEMENT_TYPES, GraphBuilder, StoredTensor
from mpt_trt.network.linear.base import computed, scaled_input, with_quantized_matrices
from mpt_trt.network.linear.specs import (
    INPUT_SCALE,
    PRE_QUANT_SCALE,
    QUANTIZED_MATRIX,
    SCALE,
    TensorSpec,
    layer_specs,
)
from mpt_trt.quantization.calibrated_weights import INT8_MAX
from mpt_trt.quantization.schemes import Quantization, SmoothQuant

# Lower bound of a row's amax, to avoid dividing a row of zeros by zero.
SMALLEST_ROW_MAXIMUM = 2.0**-14


@dataclass(frozen=True)
class SmoothQuantLinear:
    """Implements `LinearLayers` for SmoothQuant.

    Raises MptTrtError when the checkpoint is not smoothed, or was smoothed with another alpha.
    """

    checkpoint: FtCheckpoint
    rank: Rank
    scheme: SmoothQuant

    def __post_init__(self) -> None:
        require_smoothed(self.checkpoint, self.scheme.alpha)

    def tensors(self) -> dict[str, StoredTensor]:
        return with_quantized_matrices(self.checkpoint, self.rank, self._layer)

    def emit(self, graph: GraphBuilder, weight: Weight, value: str) -> str:
        name = linear_name(weight)
        value = scaled_input(graph, name, value)
        stored, scale = graph.weight(f"{name}.{QUANTIZED_MATRIX}"), graph.weight(f"{name}.{SCALE}")
        is_scalar = self._specs(weight)[SCALE].shape == ()
        matrix = graph.node(
            "DequantizeLinear",
            [stored, scale],
            f"{name}/weight",
            output_dtype=graph.element_type,
            **({} if is_scalar else {"axis": 1}),
        )
        if not self.scheme.per_token:
            scale = graph.weight(f"{name}.{INPUT_SCALE}")
            value = _rounded_to_int8(graph, value, scale, name)
            return graph.node("MatMul", [value, matrix], name)
        value, row_maximum = _rounded_by_row(graph, value, name)
        product = graph.node("MatMul", [value, matrix], f"{name}/product")
        return graph.node("Mul", [product, row_maximum], name)

    def _specs(self, weight: Weight) -> dict[str, TensorSpec]:
        config, dtype = self.checkpoint.config, self.checkpoint.storage_type
        return layer_specs(config, weight, self.rank, dtype, Quantization(self.scheme))

    def _layer(self, weight: Weight) -> dict[str, StoredTensor]:
        specs = self._specs(weight)
        files = int8_files(self.checkpoint.config, weight, self.rank)
        by_column = self.scheme.per_channel
        matrix = files.weight_col if by_column else files.weight
        scale = files.scale_w_quant_orig_col if by_column else files.scale_w_quant_orig
        tensors = {
            QUANTIZED_MATRIX: self._linked(matrix, specs[QUANTIZED_MATRIX]),
            SCALE: self._linked(scale, specs[SCALE]),
        }
        if files.smoother is not None:
            tensors[PRE_QUANT_SCALE] = self._inverse_smoother(
                files.smoother, specs[PRE_QUANT_SCALE]
            )
        if not self.scheme.per_token:
            file = files.scale_x_orig_quant
            tensors[INPUT_SCALE] = self._input_scale(file, specs[INPUT_SCALE])
        return tensors

    def _linked(self, file: FtFile, spec: TensorSpec) -> StoredTensor:
        path = self.checkpoint.folder / file.name
        return StoredTensor(file.name, ELEMENT_TYPES[spec.dtype], spec.shape, path)

    def _inverse_smoother(self, file: FtFile, spec: TensorSpec) -> StoredTensor:
        def pieces() -> Iterator[NDArray]:
            dtype = STORAGE_TYPES[spec.dtype]
            # A feature that was never active during calibration has a smoother of 1e-5.
            most = np.float32(ml_dtypes.finfo(dtype).max)
            yield convert(np.minimum(1 / self._read(file), most), dtype)

        return computed(f"{file.tensor}.inverse.{self.rank.index}", spec, pieces)

    def _input_scale(self, file: FtFile, spec: TensorSpec) -> StoredTensor:
        def pieces() -> Iterator[NDArray]:
            yield 1 / self._read(file)

        return computed(f"{file.tensor}.inverse", spec, pieces)

    def _read(self, file: FtFile) -> NDArray[np.float32]:
        return np.fromfile(self.checkpoint.folder / file.name, np.float32)


def require_smoothed(checkpoint: FtCheckpoint, alpha: float) -> None:
    """Raises MptTrtError when the checkpoint is not smoothed or has another alpha."""
    if checkpoint.smoothing != alpha:
        raise MptTrtError(
            f"{checkpoint.folder}/config.ini: smoothquant = {checkpoint.smoothing}, but "
            f"{alpha:g} is needed; convert again with -sq {alpha:g}"
        )


def _rounded_to_int8(graph: GraphBuilder, value: str, scale: str, name: str) -> str:
    """Adds the rounding of `value` to int8 in steps of `scale`, a float32 scalar."""
    quantized = graph.node(
        "QuantizeLinear", [value, scale], f"{name}/int8_input", output_dtype=TensorProto.INT8
    )
    return graph.node(
        "DequantizeLinear", [quantized, scale], f"{name}/input", output_dtype=graph.element_type
    )


def _rounded_by_row(graph: GraphBuilder, value: str, name: str) -> tuple[str, str]:
    """Divides each row by its amax, in steps of 1/127; also returns the amax `[..., 1]`.

    Runtimes do not accept computed scales, so the row is scaled to -1..1 instead.
    """
    magnitude = graph.node("Abs", [value], f"{name}/magnitude")
    axis = graph.constant("last_axis", [-1], np.int64)
    largest = graph.node("ReduceMax", [magnitude, axis], f"{name}/largest", keepdims=1)
    smallest = graph.scalar("smallest_row_maximum", SMALLEST_ROW_MAXIMUM)
    largest = graph.node("Max", [largest, smallest], f"{name}/row_maximum")
    normalized = graph.node("Div", [value, largest], f"{name}/normalized_input")
    scale = graph.constant("one_127th", 1 / INT8_MAX, np.float32)
    return _rounded_to_int8(graph, normalized, scale, name), largest
