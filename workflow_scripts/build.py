#!/usr/bin/env python3
"""Build TensorRT engines from an FT checkpoint.

Flags that choose TensorRT-LLM's plugins are accepted and ignored: here, attention, matrix products
and padding are TensorRT's own layers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import model_options, options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.ignored_options import OF_BUILD, add_ignored
from mpt_trt.cli.output_options import add_force
from mpt_trt.cli.parser import tool_parser
from mpt_trt.model.config import DTYPES
from mpt_trt.quantization.schemes import GROUP_SIZES


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/build.py --model_dir my_ft/fp16/1-gpu --output_dir my_engine",
    )
    model_options.add_ft_checkpoint(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="the engine directory")
    parser.add_argument(
        "--world_size", type=int, default=1, help="tensor-parallel size (default: %(default)s)"
    )
    parser.add_argument(
        "--parallel_build",
        action="store_true",
        help="build the plans of all ranks at the same time; each needs the memory of one rank",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="storage type of the checkpoint (default); no other type is possible",
    )
    parser.set_defaults(rank_tool=Path(__file__).resolve().parent / "steps" / "build_rank.py")
    parser.add_argument(
        "--log_level", default="info", help="least important messages shown (default: %(default)s)"
    )
    add_force(parser)
    options.add_limits(parser)
    options.add_vocabulary(parser)
    options.add_builder(parser)
    _add_quantization(parser)
    add_ignored(parser, OF_BUILD)
    options.add_trust(parser)
    return parser


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization")
    _add_integers(group)
    _add_activations(group)
    group.add_argument(
        "--head",
        choices=["auto", "int8"],
        default="auto",
        help="type of the head and the embedding; auto: that of the checkpoint (default: "
        "%(default)s)",
    )
    cache = group.add_mutually_exclusive_group()
    cache.add_argument(
        "--fp8_kv_cache",
        action="store_true",
        help="store keys and values as E4M3, with calibrated scales",
    )
    cache.add_argument(
        "--int8_kv_cache",
        action="store_true",
        help="store keys and values as int8, with calibrated scales",
    )
    group.add_argument(
        "--quant_ckpt_path",
        "--quantized_fp8_model_path",
        type=Path,
        help="npz file that quantize.py made",
    )


def _add_integers(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--use_weight_only", action="store_true", help="store weights as integers")
    group.add_argument(
        "--weight_only_precision",
        choices=["int8", "int4", "int4_awq", "int4_gptq", "mixed"],
        help="type of the integers; int4_awq, int4_gptq and mixed need --quant_ckpt_path (default: "
        "int8)",
    )
    group.add_argument(
        "--per_group",
        action="store_true",
        help="int4: one scale per group of input features; other 4-bit types always have groups",
    )
    group.add_argument(
        "--group_size",
        type=int,
        choices=GROUP_SIZES,
        help=f"input features per group, for int4 --per_group (default: {GROUP_SIZES[0]})",
    )
    group.add_argument("--bits", type=float, help="bits per weight on average, for mixed")


def _add_activations(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--use_smooth_quant",
        action="store_true",
        help="8-bit weights and activations, from a checkpoint converted with -sq",
    )
    group.add_argument(
        "--per_channel", action="store_true", help="one weight scale per output feature"
    )
    group.add_argument(
        "--per_token",
        action="store_true",
        help="one activation scale per token, computed at run time",
    )
    group.add_argument(
        "--enable_fp8",
        action="store_true",
        help="store weights as E4M3; needs --quant_ckpt_path",
    )


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.build")
