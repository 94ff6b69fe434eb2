"""How large the activations of a model get: what a calibration pass finds, by linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.config import MptConfig
from mpt_trt.errors import MptTrtError
from mpt_trt.weight_map import Weight, weights


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
    for weight in weights(config):
        if not weight.is_linear:
            continue
        layer = weight.name.removesuffix(".weight")
        try:
            found = ranges_of(ranges, weight)
        except (KeyError, IndexError):
            raise MptTrtError(f"{layer} has no activation ranges; calibrate this model") from None
        for kind, values, size in (
            ("input", found.x, weight.shape[1]),
            ("output", found.y, weight.shape[0]),
        ):
            if values.shape != (size,):
                raise MptTrtError(
                    f"{layer}: the {kind} range has shape {list(values.shape)}, but the layer has "
                    f"{size} such features; calibrate this model"
                )
            if not np.isfinite(values).all():
                raise MptTrtError(
                    f"{layer}: the {kind} range holds {values[~np.isfinite(values)][0]}; the model "
                    "computes no finite values on the calibration text"
                )
