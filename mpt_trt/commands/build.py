"""Build TensorRT engines from an FT checkpoint."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.calibration.result import read_calibration
from mpt_trt.cli import options as cli_options
from mpt_trt.cli.engine_requests import networks_progress
from mpt_trt.cli.ignored_options import report_ignored
from mpt_trt.cli.logs import set_up_logging
from mpt_trt.cli.own_flags import own_flags
from mpt_trt.engines.build.build import build_engine, build_one_by_one
from mpt_trt.engines.build.parallel import build_side_by_side
from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.quantization.schemes import (
    GROUP_SIZES,
    Awq,
    Fp8,
    Gptq,
    KvCacheType,
    Mixed,
    Quantization,
    SmoothQuant,
    WeightOnly,
    WeightQuantization,
    calibration_format,
    method_of,
)
from mpt_trt.system.progress_lines import say

# Lets Open MPI 5 start more ranks than there are cores.
OVERSUBSCRIBE = "PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe"

WEIGHT_ONLY_OPTIONS = ("weight_only_precision", "per_group", "group_size", "bits")
DEFAULT_PRECISION = "int8"
# Options that use a calibration result, by its format.
USED_WITH = {
    "int4_awq": "--use_weight_only --weight_only_precision int4_awq",
    "int4_gptq": "--use_weight_only --weight_only_precision int4_gptq",
    "mixed": "--use_weight_only --weight_only_precision mixed",
    "fp8": "--enable_fp8",
    "int8_sq": "--int8_kv_cache or --fp8_kv_cache",
    "kv_cache": "--int8_kv_cache or --fp8_kv_cache",
}

FLAGS = {
    "--calibration": "--quant_ckpt_path",
    **{name: f"--{name}" for name in ("max_batch_size", "max_input_len", "max_output_len")},
}


@own_flags(FLAGS)
def run(options: argparse.Namespace) -> None:
    set_up_logging(options.log_level)
    if options.log_level.lower() in ("debug", "info"):
        report_ignored(options)
    folder = _rank_folder(options.model_dir, options.world_size)
    checkpoint = read_ft_checkpoint(folder, options.trust)
    if checkpoint.tp_size != options.world_size:
        raise MptTrtError(
            f"--world_size = {options.world_size}, but {folder} was converted for "
            f"{checkpoint.tp_size}; give --world_size {checkpoint.tp_size}, or convert with "
            f"-tp {options.world_size}"
        )
    if options.dtype not in (None, checkpoint.storage_type):
        raise MptTrtError(
            f"--dtype = {options.dtype}, but {options.model_dir} is stored in "
            f"{checkpoint.storage_type}; convert with -t {options.dtype}"
        )
    in_parallel = partial(build_side_by_side, options.rank_tool)
    build_plans = in_parallel if options.parallel_build else build_one_by_one
    inputs = NetworkInputs(
        checkpoint,
        cli_options.limits(options),
        cli_options.vocabulary(options),
        _calibrated(options, checkpoint),
    )
    builder = cli_options.builder_choice(options, inputs.calibrated.quantization)
    progress = networks_progress(inputs.spec)
    build_engine(inputs, builder, options.output_dir, build_plans, options.force, progress)
    if (cores := len(os.sched_getaffinity(0))) < options.world_size:
        say(
            f"This machine has {cores} core(s): here, start the {options.world_size} ranks with "
            f"mpirun -n {options.world_size} --oversubscribe, or set {OVERSUBSCRIBE}"
        )
    print(options.output_dir)


def _rank_folder(model_dir: Path, world_size: int) -> Path:
    """Finds the {tp_size}-gpu folder if only its parent is named."""
    below = model_dir / f"{world_size}-gpu"
    is_above = not (model_dir / "config.ini").exists() and (below / "config.ini").exists()
    return below if is_above else model_dir


def _calibrated(options: argparse.Namespace, checkpoint: FtCheckpoint) -> CalibratedQuantization:
    path = options.quant_ckpt_path
    calibration = None if path is None else read_calibration(path, checkpoint)
    cache: KvCacheType = "auto"
    if options.fp8_kv_cache or options.int8_kv_cache:
        cache = "fp8" if options.fp8_kv_cache else "int8"
    calibrated = CalibratedQuantization(
        Quantization(_scheme(options, checkpoint.smoothing), cache, options.head), calibration
    )
    needed = calibration_format(calibrated.quantization.scheme, cache)
    if calibration is not None and needed is None:
        found = calibration.quantization_format
        raise MptTrtError(
            f"--quant_ckpt_path = {path}: a calibration result of {found}, which an engine with "
            f"quantization {method_of(calibrated.quantization.scheme)} does not use; choose a "
            f"quantization that does ({USED_WITH[found]}), or omit this option"
        )
    return calibrated.with_choice()


def _scheme(options: argparse.Namespace, alpha: float | None) -> WeightQuantization | None:
    """Makes the scheme. alpha: alpha of the checkpoint; None if it is not smoothed."""
    methods = ("use_weight_only", "use_smooth_quant", "enable_fp8")
    chosen = [f"--{name}" for name in methods if getattr(options, name)]
    if len(chosen) > 1:
        raise MptTrtError(f"{' and '.join(chosen)} exclude each other; choose one")
    if options.use_smooth_quant:
        usual = SmoothQuant().alpha if alpha is None else alpha
        return SmoothQuant(usual, options.per_channel, options.per_token)
    _require_absent(options, "--use_smooth_quant", ("per_channel", "per_token"))
    if not options.use_weight_only:
        _require_absent(options, "--use_weight_only", WEIGHT_ONLY_OPTIONS)
        return Fp8() if options.enable_fp8 else None
    precision = options.weight_only_precision or DEFAULT_PRECISION
    if precision != "mixed":
        _require_absent(options, "--weight_only_precision mixed", ("bits",))
    if precision == DEFAULT_PRECISION:
        _require_absent(options, "--weight_only_precision int4", ("per_group",))
    # The groups of other types are those of their calibration.
    if precision != "int4" or not options.per_group:
        _require_absent(options, "--weight_only_precision int4 --per_group", ("group_size",))
    if precision == "int4_awq":
        return Awq()
    if precision == "int4_gptq":
        return Gptq()
    if precision == "mixed":
        if options.bits is None:
            raise MptTrtError("--weight_only_precision = mixed: give its --bits per weight")
        return Mixed(options.bits)
    if precision == "int4":
        group_size = options.group_size or GROUP_SIZES[0]
        return WeightOnly(4, group_size if options.per_group else None)
    return WeightOnly(8)


def _require_absent(options: argparse.Namespace, owner: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise MptTrtError(f"--{name} belongs to {owner}; add that, or leave --{name} out")
