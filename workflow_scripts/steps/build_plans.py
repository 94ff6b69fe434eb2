#!/usr/bin/env python3
"""Builds the TensorRT plans of all ranks, rank{r}.engine of each, from their networks.

Plans that are finished when it fails or is interrupted are kept, beside the output, for the next
run with the same arguments.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import options as options
from mpt_trt.cli.console import run_cli, set_up_logging


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--network_dir", type=Path, required=True, help="folder that make_networks.py made"
    )
    parser.add_argument(
        "--at_once",
        type=int,
        default=1,
        help="ranks to build at a time; each needs the memory of one rank (default: %(default)s)",
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the result")
    options.add_builder(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    set_up_logging("info")
    from mpt_trt.engines.build.all_ranks import build_all_plans
    from mpt_trt.engines.manifest import read_network_limits
    from mpt_trt.errors import MptTrtError

    if arguments.at_once < 1:
        raise MptTrtError(f"--at_once = {arguments.at_once}: at least 1 is required")
    limits = read_network_limits(arguments.network_dir, rank=0)
    request = options.build_request(arguments, limits)
    build_all_plans(arguments.network_dir, request, arguments.at_once, arguments.output_dir)


if __name__ == "__main__":
    run_cli(main)
