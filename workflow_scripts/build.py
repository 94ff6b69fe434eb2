#!/usr/bin/env python3
"""Builds TensorRT engines from an FT checkpoint.

Flags that chose TensorRT-LLM's plugins are accepted and change nothing: attention, products and
padding are TensorRT's own layers here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import options
from mpt_trt.cli.console import run_command
from mpt_trt.quantization.schemes import GROUP_SIZES


def make_parser() -> argparse.ArgumentParser:
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
    options.add_ignored(parser)
    return parser


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


if __name__ == "__main__":
    run_command(make_parser(), "mpt_trt.commands.build")
