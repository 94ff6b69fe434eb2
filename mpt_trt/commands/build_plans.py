"""Builds the TensorRT plans of all ranks, rank{r}.engine of each, from their networks."""

from __future__ import annotations

import argparse

from mpt_trt.cli import options as cli_options
from mpt_trt.cli.terminal import set_up_logging
from mpt_trt.engines.build.all_ranks import build_all_plans
from mpt_trt.errors import MptTrtError


def run(options: argparse.Namespace) -> None:
    set_up_logging("info")
    if options.at_once < 1:
        raise MptTrtError(f"--at_once = {options.at_once}: at least 1 is required")
    builder = cli_options.builder_choice(options)
    build_all_plans(options.network_dir, builder, options.at_once, options.output_dir)
