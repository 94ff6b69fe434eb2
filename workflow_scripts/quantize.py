#!/usr/bin/env python3
"""Calibrates a model for quantization and writes {export_path}/mpt_tp1_rank0.npz.

The model reads pieces of a text while NVIDIA's ModelOpt watches its linear layers, one block at a
time: memory is that of two blocks and of the pieces' hidden states. The file is in AMMO's layout;
an engine of any number of ranks is made from it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import calibration_options as options
from mpt_trt.cli.console import run_cli, set_up_logging, steps_progress
from mpt_trt.quantization.schemes import GROUP_SIZES
from mpt_trt.workflow.target_names import FORMATS

if TYPE_CHECKING:
    from mpt_trt.calibration.modelopt import CalibrationPlan
    from mpt_trt.model.config import MptConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--model_dir",
        required=True,
        help="hub id or folder of a Hugging Face checkpoint, or a {tp_size}-gpu folder of an FT "
        "checkpoint",
    )
    add("--revision", default="main", help="on the hub (default: %(default)s)")
    add(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="float16",
        help="what a GPU computes in (a CPU: float32); with float16, weights are stored in it, "
        "otherwise in float32 (default: %(default)s)",
    )
    add(
        "--qformat",
        choices=FORMATS,
        required=True,
        help="what for; kv_cache: ranges of keys and values alone, which the others have, too",
    )
    add("--export_path", type=Path, required=True, help="folder of the result")
    add(
        "--awq_block_size",
        type=int,
        choices=GROUP_SIZES,
        help="input features that share a scale, with int4_awq (default: 128, or less where ranks "
        "would share a group)",
    )
    add("--log_level", default="info", help="(default: %(default)s)")
    options.add_calibration(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    options.fill_in(arguments)
    set_up_logging(arguments.log_level)
    import numpy as np

    from mpt_trt.calibration.model_source import open_model
    from mpt_trt.calibration.modelopt import calibrate
    from mpt_trt.calibration.npz_keys import FILE_NAME
    from mpt_trt.checkpoint import hub
    from mpt_trt.checkpoint.tokenizer import read_tokenizer

    folder, _ = hub.local_folder(arguments.model_dir, arguments.revision)
    source = open_model(folder)
    plan = _plan(arguments, source.config)
    computation = options.computation(arguments, arguments.dtype)
    tokenizer = read_tokenizer(
        hub.tokenizer_folder_of(folder, source.origin, arguments.tokenizer_dir)
    )
    samples = options.calibration_samples(arguments, tokenizer)
    target = arguments.export_path / FILE_NAME
    weight_dtype = np.dtype(np.float16 if arguments.dtype == "float16" else np.float32)
    with steps_progress(f"Calibrating {folder}", source.config.num_layers) as advance:
        calibrate(source, samples, plan, computation, weight_dtype, target, advance)
    print(f"{target}: {arguments.qformat}, {target.stat().st_size / 1e6:.1f} MB")


def _plan(arguments: argparse.Namespace, config: MptConfig) -> CalibrationPlan:
    from mpt_trt.calibration.modelopt import CalibrationPlan
    from mpt_trt.errors import MptTrtError
    from mpt_trt.quantization.schemes import default_group_size, require_fitting_groups

    group_size = arguments.awq_block_size
    if arguments.qformat != "int4_awq":
        if group_size is not None:
            raise MptTrtError(
                f"--awq_block_size = {group_size}: {arguments.qformat} has no groups; leave it out"
            )
        return CalibrationPlan(arguments.qformat)
    if group_size is None:
        group_size = default_group_size(config)
    require_fitting_groups(config, 1, group_size)
    return CalibrationPlan(arguments.qformat, group_size)


if __name__ == "__main__":
    run_cli(main)
