"""The quantization that parsed options ask for."""

from __future__ import annotations

import argparse

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.calibration.result import read_calibration
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.quantization.schemes import Quantization, make_weight_quantization


def calibrated(options: argparse.Namespace, checkpoint: FtCheckpoint) -> CalibratedQuantization:
    """The quantization asked for; the calibration is checked against the checkpoint."""
    scheme = make_weight_quantization(
        options.quantization,
        group_size=options.group_size,
        alpha=options.alpha,
        per_channel=options.per_channel,
        per_token=options.per_token,
    )
    path = options.calibration
    calibration = None if path is None else read_calibration(path, checkpoint)
    return CalibratedQuantization(Quantization(scheme, options.kv_cache_dtype), calibration)
