"""Build the TensorRT plan of one rank, rank{r}.engine, from its network."""

from __future__ import annotations

import argparse

from mpt_trt.cli import options as cli_options
from mpt_trt.engines.build.build import build_rank
from mpt_trt.engines.rank_descriptions import read_network_spec


def run(options: argparse.Namespace) -> None:
    spec = read_network_spec(options.network_dir, options.rank)
    builder = cli_options.builder_choice(options, spec.quantization)
    build_rank(options.network_dir, options.rank, builder, options.output_dir, options.trust)
