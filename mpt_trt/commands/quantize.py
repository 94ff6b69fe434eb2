"""Calibrate a model for quantization and write {export_path}/mpt_tp1_rank0.npz."""

from __future__ import annotations

import argparse

import numpy as np

from mpt_trt.calibration.calibrate import calibrate
from mpt_trt.calibration.defaults import FILE_NAME
from mpt_trt.calibration.model_source import model_folder, open_model
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.calibration.writer import require_replaceable_result
from mpt_trt.checkpoint.source import checkpoint_folder, tokenizer_folder_of
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.cli import calibration_requests
from mpt_trt.cli.calibration_options import fill_in
from mpt_trt.cli.ignored_options import report_ignored
from mpt_trt.cli.logs import set_up_logging
from mpt_trt.cli.progress import steps_progress
from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig
from mpt_trt.quantization.schemes import GROUPED, Mixed, default_group_size, require_fitting_groups


def run(options: argparse.Namespace) -> None:
    fill_in(options)
    target = options.export_path / FILE_NAME
    require_replaceable_result(target, options.force)
    report_ignored(options)
    set_up_logging(options.log_level)
    folder, _ = checkpoint_folder(options.model_dir, options.revision)
    folder = model_folder(folder)
    source = open_model(folder, options.adapter)
    plan = _plan(options, source.config)
    computation = calibration_requests.computation(options, options.dtype)
    tokenizer = read_tokenizer(
        tokenizer_folder_of(folder, source.provenance, options.tokenizer_dir)
    ).require_fitting(source.config.vocab_size)
    samples = calibration_requests.calibration_samples(options, tokenizer)
    weight_dtype = np.dtype(np.float16 if options.dtype == "float16" else np.float32)
    with steps_progress(f"Calibrating {folder}", source.config.num_layers) as advance:
        calibrate(source, samples, plan, computation, weight_dtype, target, advance)
    print(f"{target}: {options.qformat}, {target.stat().st_size / 1e6:.1f} MB")


def _plan(options: argparse.Namespace, config: MptConfig) -> CalibrationPlan:
    group_size = options.awq_block_size
    if options.qformat == "mixed" and options.bits is None:
        raise MptTrtError("--qformat = mixed: give its --bits per weight")
    if options.qformat != "mixed" and options.bits is not None:
        raise MptTrtError(
            f"--bits = {options.bits:g}: only mixed has a budget, and --qformat is "
            f"{options.qformat}; leave --bits out"
        )
    if options.scales != "amax" and options.qformat != "int4_awq":
        raise MptTrtError(
            f"--scales = {options.scales}: only int4_awq has a choice of scales; leave it out"
        )
    if options.qformat not in GROUPED:
        if group_size is not None:
            raise MptTrtError(
                f"--awq_block_size = {group_size}: {options.qformat} has no groups; leave it out"
            )
        bits = None if options.bits is None else Mixed(options.bits).bits
        return CalibrationPlan(options.qformat, bits=bits)
    if group_size is None:
        group_size = default_group_size(config)
    require_fitting_groups(config, 1, group_size)
    return CalibrationPlan(options.qformat, group_size, scales=options.scales)
