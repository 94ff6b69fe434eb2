"""Chooses the linear layers for a quantization."""

from __future__ import annotations

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.sharding import Rank
from mpt_trt.network.linear.awq import AwqLinear
from mpt_trt.network.linear.base import LinearLayers
from mpt_trt.network.linear.fp8 import Fp8Linear
from mpt_trt.network.linear.gptq import GptqLinear
from mpt_trt.network.linear.plain import PlainLinear
from mpt_trt.network.linear.smoothquant import SmoothQuantLinear
from mpt_trt.network.linear.weight_only import WeightOnlyLinear
from mpt_trt.quantization.schemes import Awq, Fp8, Gptq, Mixed, SmoothQuant, WeightOnly


def make_linear(
    checkpoint: FtCheckpoint, rank: Rank, calibrated: CalibratedQuantization
) -> LinearLayers:
    """Makes the linear layers of a rank.

    Raises MptTrtError when the checkpoint or the calibration does not fit the scheme.
    """
    quantization = calibrated.quantization
    if not isinstance(quantization.scheme, SmoothQuant):
        checkpoint.require_plain()
    match quantization.scheme:
        case None:
            return PlainLinear(checkpoint, rank)
        case WeightOnly() as scheme:
            return WeightOnlyLinear(checkpoint, rank, scheme)
        case Awq():
            return AwqLinear(
                checkpoint, rank, calibrated.required_calibration, quantization.kv_cache
            )
        case Gptq() | Mixed():
            return GptqLinear(checkpoint, rank, calibrated.required_calibration)
        case Fp8():
            return Fp8Linear(checkpoint, rank, calibrated.required_calibration)
        case SmoothQuant() as scheme:
            return SmoothQuantLinear(checkpoint, rank, scheme)
