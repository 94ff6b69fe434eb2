#!/usr/bin/env python3
"""Builds the TensorRT plan of one rank, rank{r}.engine, from its network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import options as options
from mpt_trt.cli.console import run_cli


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--network_dir", type=Path, required=True, help="folder that make_networks.py made"
    )
    parser.add_argument("--rank", type=int, default=0, help="which rank (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the result")
    options.add_builder(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from mpt_trt.engines.build.build import build_rank
    from mpt_trt.engines.manifest import read_network_limits

    limits = read_network_limits(arguments.network_dir, arguments.rank)
    request = options.build_request(arguments, limits)
    build_rank(arguments.network_dir, arguments.rank, request, arguments.output_dir)


if __name__ == "__main__":
    run_cli(main)
