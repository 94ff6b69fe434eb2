#!/usr/bin/env python3
"""Puts the networks and plans of all ranks together as an engine directory, by hard links."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpt_trt.console import run_cli


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--network_dirs", type=Path, nargs="+", required=True, help="one a rank, in order"
    )
    parser.add_argument(
        "--plan_dirs", type=Path, nargs="+", required=True, help="one a rank, in order"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="the engine directory")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from mpt_trt.engines.manifest import collect
    from mpt_trt.errors import MptTrtError

    networks, plans = arguments.network_dirs, arguments.plan_dirs
    if len(networks) != len(plans):
        raise MptTrtError(f"{len(networks)} --network_dirs but {len(plans)} --plan_dirs")
    collect(list(zip(networks, plans, strict=True)), arguments.output_dir)


if __name__ == "__main__":
    run_cli(main)
