"""Builds the TensorRT plan of one rank, rank{r}.engine, from its network."""

from __future__ import annotations

import argparse

from mpt_trt.cli import engine_requests
from mpt_trt.engines.build.build import build_rank
from mpt_trt.engines.manifest import read_network_limits


def run(options: argparse.Namespace) -> None:
    limits = read_network_limits(options.network_dir, options.rank)
    request = engine_requests.build_request(options, limits)
    build_rank(options.network_dir, options.rank, request, options.output_dir)
