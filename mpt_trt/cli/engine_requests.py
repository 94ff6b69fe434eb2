"""Shared parts of commands that make networks: requested quantization, and progress."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.calibration.result import read_calibration
from mpt_trt.cli.progress import bytes_progress
from mpt_trt.engines.memory import rank_weights
from mpt_trt.engines.spec import EngineSpec
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.quantization.schemes import Quantization, make_weight_quantization
from mpt_trt.system.progress_lines import Advance


def calibrated(options: argparse.Namespace, checkpoint: FtCheckpoint) -> CalibratedQuantization:
    """Reads the requested quantization, and checks its calibration against the checkpoint."""
    scheme = make_weight_quantization(
        options.quantization,
        group_size=options.group_size,
        alpha=options.alpha,
        per_channel=options.per_channel,
        per_token=options.per_token,
    )
    path = options.calibration
    calibration = None if path is None else read_calibration(path, checkpoint)
    quantization = Quantization(scheme, options.kv_cache_dtype, options.head)
    return CalibratedQuantization(quantization, calibration)


def networks_progress(spec: EngineSpec) -> AbstractContextManager[Advance]:
    """Shows progress in bytes of the weights of all ranks' networks."""
    return bytes_progress("Writing networks", spec.tp_size * rank_weights(spec))
