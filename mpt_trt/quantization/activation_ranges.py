"""How large the activations of a model get: what a calibration pass finds, by linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import Weight, block_matrices


@dataclass(frozen=True)
class LinearRanges:
    """Of one linear layer, float32: max|x| `[in_features]` and max|y| `[out_features]`."""

    x: NDArray[np.float32]
    y: NDArray[np.float32]


ActivationRanges = list[dict[str, LinearRanges]]
"""By layer, then by FT name of the linear layer within it, e.g. `attention.dense`."""


def ranges_of(ranges: ActivationRanges, weight: Weight) -> LinearRanges:
    """The ranges of the layer whose weight it is; raises KeyError or IndexError without them."""
    _, layer, name = weight.name.removesuffix(".weight").split(".", 2)
    return ranges[int(layer)][name]


def require_ranges(ranges: ActivationRanges, config: MptConfig) -> None:
    """Raises MptTrtError, naming the layer, when ranges are missing, misshapen or not finite."""
    for layer in range(config.num_layers):
        for name, weight in block_matrices(config, layer).items():
            if len(ranges) <= layer or name not in ranges[layer]:
                raise MptTrtError(
                    f"layers.{layer}.{name} has no activation ranges; calibrate this model"
                )
            found = ranges[layer][name]
            _require_fitting(f"layers.{layer}.{name}: the input range", found.x, weight.shape[1])
            _require_fitting(f"layers.{layer}.{name}: the output range", found.y, weight.shape[0])


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
