"""Builds the TensorRT plans of all ranks, rank{r}.engine of each, from their networks."""

from __future__ import annotations

import argparse

from mpt_trt.cli import engine_requests
from mpt_trt.cli.terminal import set_up_logging
from mpt_trt.engines.build.all_ranks import build_all_plans
from mpt_trt.engines.manifest import read_network_limits
from mpt_trt.errors import MptTrtError


def run(options: argparse.Namespace) -> None:
    set_up_logging("info")
    if options.at_once < 1:
        raise MptTrtError(f"--at_once = {options.at_once}: at least 1 is required")
    limits = read_network_limits(options.network_dir, rank=0)
    request = engine_requests.build_request(options, limits)
    build_all_plans(options.network_dir, request, options.at_once, options.output_dir)
