"""Names of the arrays in a calibration result.

Keys are `_np:` and the path of a tensor in AMMO's model, joined by `:`; docs/formats.md lists them.
Q, K and V are separate there, and one matrix with rows Q | K | V here. Data without a place in
AMMO's layout is stored under `mpt_trt:`, which AMMO's readers ignore: the amax of keys and values,
and a small corner of every matrix, which shows whether a result belongs to a model.
"""

from __future__ import annotations

import re

from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import BlockMatrix, Weight
from mpt_trt.quantization.schemes import QuantizationFormat

MATRIX_KEYS = {
    BlockMatrix.QKV: ("attention:qkv:q", "attention:qkv:k", "attention:qkv:v"),
    BlockMatrix.OUTPUT: ("attention:dense",),
    BlockMatrix.UP: ("mlp:fc",),
    BlockMatrix.DOWN: ("mlp:proj",),
}
NORM_KEYS = {
    f"{BlockMatrix.QKV.norm}.weight": "input_layernorm:weight",
    f"{BlockMatrix.UP.norm}.weight": "post_layernorm:weight",
}

WEIGHT, SMOOTHING = "weight", "prequant_scaling_factor"
WEIGHT_SCALE, ACTIVATION_SCALE = "weights_scaling_factor", "activation_scaling_factor"

# Key of the budget in bits per weight, which only results of mixed have.
BUDGET = "mpt_trt:mixed:bits"

# Key that only results of int4_awq have whose scales were chosen by error; its value is 1.
SCALES_BY_ERROR = "mpt_trt:scales_by_error"

# Formats whose results contain whole matrices.
WITH_MATRICES: tuple[QuantizationFormat, ...] = ("int4_awq", "int4_gptq", "mixed", "int8_sq")

# Rows and columns of each matrix's corner, which distinguishes models.
CORNER = (8, 64)


def matrix_keys(layer: int, matrix: BlockMatrix) -> list[str]:
    """Keys of a matrix, or of Q, K and V."""
    return [f"_np:layers:{layer}:{key}" for key in MATRIX_KEYS[matrix]]


def heights_of(config: MptConfig, matrix: BlockMatrix, out_features: int) -> list[int]:
    """Output features of a matrix, or of Q, K and V."""
    if matrix == BlockMatrix.QKV:
        return [config.hidden_size, config.kv_size, config.kv_size]
    return [out_features]


def whole_key(weight: Weight) -> str | None:
    """Key of the embedding or of a norm's weight in AMMO's layout; None for other tensors."""
    if weight.name == "wte":
        return "_np:vocab_embedding:weight"
    if weight.name == "final_layernorm.weight":
        return "_np:final_layernorm:weight"
    match = re.fullmatch(r"layers\.([0-9]+)\.(.+)", weight.name)
    if match is None or match[2] not in NORM_KEYS:
        return None
    return f"_np:layers:{match[1]}:{NORM_KEYS[match[2]]}"


def amax_key(layer: int, name: str) -> str:
    """Key of the amax of keys or values (name: `key` or `value`)."""
    return f"mpt_trt:layers:{layer}:attention:{name}:amax"


def bits_key(layer: int, matrix: BlockMatrix) -> str:
    """Key of the bits of a matrix's integers, which only results of int4_gptq have."""
    return f"mpt_trt:layers:{layer}:{matrix.replace('.', ':')}:bits"


def corner_key(weight: Weight) -> str:
    """Key of the first rows and columns of a matrix."""
    return f"mpt_trt:{weight.name.replace('.', ':')}:corner"


def shape_key(weight: Weight) -> str:
    """Key of the shape of a matrix."""
    return f"mpt_trt:{weight.name.replace('.', ':')}:shape"
