"""The amax of each linear layer's inputs and outputs, from a calibration pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import BlockMatrix, Weight, block_matrices


@dataclass(frozen=True)
class LinearAmax:
    """Amax of each input and output feature of a linear layer.

    x: max|x|, float32 `[in_features]`. y: max|y|, float32 `[out_features]`.
    """

    x: NDArray[np.float32]
    y: NDArray[np.float32]


ActivationAmax = list[dict[BlockMatrix, LinearAmax]]
"""Amax by layer, then by matrix."""


def amax_of(amax: ActivationAmax, weight: Weight) -> LinearAmax:
    """Returns the amax of the layer of `weight`; raises KeyError or IndexError without it."""
    layer, matrix = weight.place
    return amax[layer][matrix]


def require_amax(amax: ActivationAmax, config: MptConfig) -> None:
    """Raises MptTrtError, naming the layer, when an amax is missing, misshapen or not finite."""
    for layer in range(config.num_layers):
        for matrix, weight in block_matrices(config, layer).items():
            name = f"layers.{layer}.{matrix}"
            if len(amax) <= layer or matrix not in amax[layer]:
                raise MptTrtError(f"{name} has no activation amax; calibrate this model")
            linear = amax[layer][matrix]
            _require_fitting(f"{name}: the input amax", linear.x, weight.shape[1])
            _require_fitting(f"{name}: the output amax", linear.y, weight.shape[0])


def _require_fitting(name: str, values: NDArray[np.float32], size: int) -> None:
    if values.shape != (size,):
        raise MptTrtError(
            f"{name} has shape {list(values.shape)}, but the layer has {size} such features; "
            "calibrate this model"
        )
    if not np.isfinite(values).all():
        raise MptTrtError(
            f"{name} holds {values[~np.isfinite(values)][0]}; the model computes no finite values "
            "on the calibration text"
        )
