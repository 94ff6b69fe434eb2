"""How large the activations of a model get: what a calibration pass finds, by linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.config import MptConfig
from mpt_trt.errors import MptTrtError
from mpt_trt.weight_map import Weight, weights


@dataclass(frozen=True)
class LinearRange:
    """Largest magnitude of every feature of a linear layer's input and output.

    x: float32 `[in_features]`. y: float32 `[out_features]`.
    """

    x: NDArray[np.float32]
    y: NDArray[np.float32]


Ranges = Mapping[str, LinearRange]
"""By Hugging Face name without `transformer.` and `.weight`, e.g. `blocks.0.attn.Wqkv`."""


def range_name(weight: Weight) -> str:
    """The key of a linear layer's weight in Ranges."""
    if weight.hf_name is None:
        raise ValueError(f"{weight.name} is not stored in Hugging Face checkpoints")
    return weight.hf_name.removesuffix(".weight")


def require_ranges(ranges: Ranges, config: MptConfig) -> None:
    """Raises MptTrtError, naming the layer, when a range is missing, misshapen or not finite."""
    for weight in weights(config):
        if not weight.is_linear:
            continue
        name = range_name(weight)
        if name not in ranges:
            raise MptTrtError(f"no activation range of {name}; calibrate this very model")
        for kind, values, size in (
            ("input", ranges[name].x, weight.shape[1]),
            ("output", ranges[name].y, weight.shape[0]),
        ):
            if values.shape != (size,):
                raise MptTrtError(
                    f"the {kind} range of {name} has shape {list(values.shape)}, but the layer has "
                    f"{size} features; calibrate this very model"
                )
            if not np.isfinite(values).all():
                raise MptTrtError(
                    f"the {kind} range of {name} holds {values[~np.isfinite(values)][0]}; the "
                    "checkpoint computes no finite values on the calibration text"
                )
