"""Shared parts of commands that make networks: requested quantization, and progress."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.calibration.result import read_calibration
from mpt_trt.cli.options import quantization
from mpt_trt.cli.progress import bytes_progress
from mpt_trt.engines.memory import rank_weights
from mpt_trt.engines.spec import EngineSpec
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.system.progress_lines import Advance


def calibrated(options: argparse.Namespace, checkpoint: FtCheckpoint) -> CalibratedQuantization:
    """Reads the requested quantization, and checks its calibration against the checkpoint."""
    path = options.calibration
    calibration = None if path is None else read_calibration(path, checkpoint)
    return CalibratedQuantization(quantization(options), calibration).with_choice()


def networks_progress(spec: EngineSpec) -> AbstractContextManager[Advance]:
    """Shows progress in bytes of the weights of all ranks' networks."""
    return bytes_progress("Writing networks", spec.tp_size * rank_weights(spec))
