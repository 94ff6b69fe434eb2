"""Build the TensorRT plan of one rank, rank{r}.engine, from its network."""

from __future__ import annotations

import argparse

from mpt_trt.cli import options as cli_options
from mpt_trt.engines.build.build import build_rank


def run(options: argparse.Namespace) -> None:
    builder = cli_options.builder_choice(options)
    build_rank(options.network_dir, options.rank, builder, options.output_dir, options.trust)
