"""Names, types and shapes of the tensors that a linear layer stores, without their content.

Imports neither NumPy nor ONNX, because Snakemake's planning computes the sizes of engines from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpt_trt.ft.layout import ft_file
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import BlockMatrix, Split, Weight
from mpt_trt.quantization.schemes import (
    Awq,
    Fp8,
    Gptq,
    IntegerFormat,
    Mixed,
    Quantization,
    SmoothQuant,
    WeightOnly,
    folds_into_values,
    group_size_of,
    scale_block,
)

# Names relative to the layer, as in `layers.0.attention.dense.weight.scale`.
MATRIX, QUANTIZED_MATRIX, SCALE = "weight", "weight.quantized", "weight.scale"
PRE_QUANT_SCALE, INPUT_SCALE = "pre_quant_scale", "input_scale"

BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "fp8": 8, "int4": 4}


@dataclass(frozen=True)
class TensorSpec:
    """Type, a key of BITS, and shape of a stored tensor; 4-bit integers are packed in pairs."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def byte_size(self) -> int:
        """Size of the tensor's file."""
        return math.ceil(math.prod(self.shape) * BITS[self.dtype] / 8)


def layer_specs(
    config: MptConfig, weight: Weight, rank: Rank, dtype: str, quantization: Quantization
) -> dict[str, TensorSpec]:
    """Tensors that a rank's network stores instead of a block's matrix, by name.

    dtype: type of the unquantized network.
    """
    # The network has FT's order, [in_features, out_features].
    shape = height, width = ft_file(config, weight, rank, dtype).shape
    match quantization.scheme:
        case None:
            return {MATRIX: TensorSpec(dtype, shape)}
        case WeightOnly(bits=bits) as scheme:
            block = scale_block(scheme, height)
            scales = (width,) if block is None else (height // block, width)
            return {
                QUANTIZED_MATRIX: TensorSpec(f"int{bits}", shape),
                SCALE: TensorSpec(dtype, scales),
            }
        case Gptq() as scheme:
            form = IntegerFormat(4, group_size_of(scheme, config))
            return integer_specs(config, weight, rank, dtype, form)
        case Mixed(formats=()) as scheme:
            # Until the choice is known, each matrix has its part of the budget.
            return {
                QUANTIZED_MATRIX: TensorSpec("int8", (math.ceil(height * width * scheme.bits / 8),))
            }
        case Mixed() as scheme:
            return integer_specs(config, weight, rank, dtype, scheme.format_of(*weight.place))
        case Awq() as scheme:
            form = IntegerFormat(4, group_size_of(scheme, config))
            specs = integer_specs(config, weight, rank, dtype, form)
            is_folded = folds_into_values(config, quantization.kv_cache)
            if _has_pre_quant_scale(weight, is_folded):
                specs[PRE_QUANT_SCALE] = TensorSpec(dtype, (height,))
            return specs
        case SmoothQuant() as scheme:
            return _smoothquant_specs(weight, shape, dtype, scheme)
        case Fp8():
            return {QUANTIZED_MATRIX: TensorSpec("fp8", shape)}


def integer_specs(
    config: MptConfig, weight: Weight, rank: Rank, dtype: str, form: IntegerFormat
) -> dict[str, TensorSpec]:
    """The tensors of a matrix of integers, by name, for a rank."""
    shape = height, width = ft_file(config, weight, rank, dtype).shape
    scales = (width,) if form.group_size is None else (height // form.group_size, width)
    return {
        QUANTIZED_MATRIX: TensorSpec(f"int{form.bits}", shape),
        SCALE: TensorSpec(dtype, scales),
    }


def _smoothquant_specs(
    weight: Weight, shape: tuple[int, ...], dtype: str, scheme: SmoothQuant
) -> dict[str, TensorSpec]:
    height, width = shape
    # FT always scales Q, K and V separately.
    is_scalar = not scheme.per_channel and weight.split is not Split.QKV
    specs = {
        QUANTIZED_MATRIX: TensorSpec("int8", shape),
        SCALE: TensorSpec("float32", () if is_scalar else (width,)),
    }
    if _has_pre_quant_scale(weight, is_folded_into_values=False):
        specs[PRE_QUANT_SCALE] = TensorSpec(dtype, (height,))
    if not scheme.per_token:
        specs[INPUT_SCALE] = TensorSpec("float32", ())
    return specs


def _has_pre_quant_scale(weight: Weight, is_folded_into_values: bool) -> bool:
    """Returns whether neither a norm nor V's columns have absorbed the factors of the input."""
    if weight.matrix is None or weight.matrix.norm is not None:
        return False
    return weight.matrix is not BlockMatrix.OUTPUT or not is_folded_into_values
