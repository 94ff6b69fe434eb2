#!/usr/bin/env python3
"""Builds TensorRT engines from an FT checkpoint.

Flags that chose TensorRT-LLM's plugins are accepted and change nothing: attention, products and
padding are TensorRT's own layers here.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import options as options
from mpt_trt.cli.console import run_cli, set_up_logging
from mpt_trt.quantization.schemes import GROUP_SIZES

if TYPE_CHECKING:
    from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
    from mpt_trt.engines.build.build import BuildRequest
    from mpt_trt.ft.checkpoint import FtCheckpoint
    from mpt_trt.quantization.schemes import WeightQuantization

WITHOUT_EFFECT = (
    "use_gpt_attention_plugin",
    "use_gemm_plugin",
    "use_layernorm_plugin",
    "use_weight_only_quant_matmul_plugin",
    "use_smooth_quant_gemm_plugin",
    "strongly_typed",
    "enable_context_fmha",
    "enable_context_fmha_fp32_acc",
    "remove_input_padding",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model_dir", type=Path, required=True, help="a {tp_size}-gpu folder of an FT checkpoint"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="the engine directory")
    parser.add_argument(
        "--world_size", type=int, default=1, help="number of ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--parallel_build",
        action="store_true",
        help="build the ranks' plans at the same time; each needs the memory of one rank",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="must be the checkpoint's storage type, which is the default",
    )
    parser.add_argument("--log_level", default="info", help="(default: %(default)s)")
    options.add_limits(parser)
    options.add_vocabulary(parser)
    options.add_builder(parser)
    _add_quantization(parser)
    group = parser.add_argument_group("accepted, without effect")
    for name in WITHOUT_EFFECT:
        group.add_argument(f"--{name}", nargs="?", const=True, default=False)
    return parser.parse_args()


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization")
    group.add_argument("--use_weight_only", action="store_true", help="integer weights")
    group.add_argument(
        "--weight_only_precision",
        choices=["int8", "int4", "int4_awq"],
        default="int8",
        help="their kind; int4_awq needs --quant_ckpt_path (default: %(default)s)",
    )
    group.add_argument(
        "--per_group",
        action="store_true",
        help="int4: a scale for each group of input features; int4_awq has that in any case",
    )
    group.add_argument(
        "--group_size",
        type=int,
        choices=GROUP_SIZES,
        default=GROUP_SIZES[0],
        help="input features of a group, for int4 --per_group (default: %(default)s)",
    )
    group.add_argument(
        "--use_smooth_quant",
        action="store_true",
        help="8-bit weights and activations, from a checkpoint converted with -sq",
    )
    group.add_argument(
        "--per_channel", action="store_true", help="a weight scale for every output feature"
    )
    group.add_argument(
        "--per_token", action="store_true", help="activation scales computed for every token"
    )
    group.add_argument(
        "--enable_fp8", action="store_true", help="E4M3; needs --quantized_fp8_model_path"
    )
    cache = group.add_mutually_exclusive_group()
    cache.add_argument(
        "--fp8_kv_cache", action="store_true", help="keys and values as E4M3, calibrated"
    )
    cache.add_argument(
        "--int8_kv_cache", action="store_true", help="keys and values as int8, calibrated"
    )
    group.add_argument(
        "--quant_ckpt_path",
        "--quantized_fp8_model_path",
        type=Path,
        help="npz file that quantize.py made",
    )


def main() -> None:
    arguments = parse_arguments()
    set_up_logging(arguments.log_level)
    from mpt_trt.engines.build.build import build_engine, build_one_by_one
    from mpt_trt.errors import MptTrtError
    from mpt_trt.ft.checkpoint import read_ft_checkpoint

    ignored = [f"--{name}" for name in WITHOUT_EFFECT if getattr(arguments, name)]
    if ignored:
        logging.info("Without effect here: %s", " ".join(ignored))
    checkpoint = read_ft_checkpoint(_rank_folder(arguments.model_dir, arguments.world_size))
    if checkpoint.tp_size != arguments.world_size:
        raise MptTrtError(
            f"--world_size = {arguments.world_size}, but {arguments.model_dir} was converted for "
            f"{checkpoint.tp_size}; convert with -tp {arguments.world_size}"
        )
    if arguments.dtype not in (None, checkpoint.storage_type):
        raise MptTrtError(
            f"--dtype = {arguments.dtype}, but {arguments.model_dir} is stored in "
            f"{checkpoint.storage_type}; convert with -t {arguments.dtype}"
        )
    request = options.build_request(arguments, options.limits(arguments))
    build_plans = build_all_at_once if arguments.parallel_build else build_one_by_one
    vocabulary = options.vocabulary(arguments)
    calibrated = _calibrated(arguments, checkpoint)
    build_engine(checkpoint, request, vocabulary, arguments.output_dir, build_plans, calibrated)
    print(arguments.output_dir)


def _rank_folder(model_dir: Path, world_size: int) -> Path:
    """The {tp_size}-gpu folder, where only the one above it is named."""
    below = model_dir / f"{world_size}-gpu"
    is_above = not (model_dir / "config.ini").exists() and (below / "config.ini").exists()
    return below if is_above else model_dir


def _calibrated(arguments: argparse.Namespace, checkpoint: FtCheckpoint) -> CalibratedQuantization:
    from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
    from mpt_trt.calibration.result import read_calibration
    from mpt_trt.quantization.schemes import Quantization

    path = arguments.quant_ckpt_path
    calibration = None if path is None else read_calibration(path, checkpoint)
    cache = "fp8" if arguments.fp8_kv_cache else "int8" if arguments.int8_kv_cache else "auto"
    return CalibratedQuantization(
        Quantization(_scheme(arguments, checkpoint.smoothing), cache), calibration
    )


def _scheme(arguments: argparse.Namespace, alpha: float | None) -> WeightQuantization | None:
    """alpha: of the checkpoint, None when it is not smoothed."""
    from mpt_trt.errors import MptTrtError
    from mpt_trt.quantization.schemes import Awq, Fp8, SmoothQuant, WeightOnly

    methods = ("use_weight_only", "use_smooth_quant", "enable_fp8")
    chosen = [f"--{name}" for name in methods if getattr(arguments, name)]
    if len(chosen) > 1:
        raise MptTrtError(f"{' and '.join(chosen)} exclude each other; choose one")
    if arguments.use_smooth_quant:
        usual = SmoothQuant().alpha if alpha is None else alpha
        return SmoothQuant(usual, arguments.per_channel, arguments.per_token)
    if arguments.per_channel or arguments.per_token:
        raise MptTrtError("--per_channel and --per_token belong to --use_smooth_quant; add it")
    if arguments.enable_fp8:
        return Fp8()
    if not arguments.use_weight_only:
        return None
    if arguments.weight_only_precision == "int4_awq":
        return Awq()
    if arguments.weight_only_precision == "int8":
        return WeightOnly(8)
    return WeightOnly(4, arguments.group_size if arguments.per_group else None)


def build_all_at_once(folder: Path, request: BuildRequest, tp_size: int) -> None:
    """Adds the plans of all ranks to the folder that has their networks, a process a rank."""
    from mpt_trt.engines.build.parallel import build_side_by_side

    plans = {rank: folder / f"plan{rank}" for rank in range(tp_size)}
    build_side_by_side(folder, request, plans, at_once=tp_size)
    for plan in plans.values():
        for path in plan.iterdir():
            path.rename(folder / path.name)
        plan.rmdir()


if __name__ == "__main__":
    run_cli(main)
