#!/usr/bin/env python3
"""Puts the networks and plans of all ranks together as an engine directory, by hard links."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli.console import run_cli


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--network_dir", type=Path, required=True, help="folder that make_networks.py made"
    )
    parser.add_argument(
        "--plan_dir", type=Path, required=True, help="folder that build_plans.py made"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="the engine directory")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from mpt_trt.engines.manifest import collect, read_network_tp_size

    tp_size = read_network_tp_size(arguments.network_dir)
    collect([(arguments.network_dir, arguments.plan_dir)] * tp_size, arguments.output_dir)


if __name__ == "__main__":
    run_cli(main)
