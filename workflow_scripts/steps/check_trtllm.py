#!/usr/bin/env python3
"""Writes TensorRT-LLM's version as JSON, or ends where there is none that we can build with."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli.console import run_cli


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from mpt_trt.engines.trtllm.package import builder_path, require_tensorrt_llm
    from mpt_trt.system.files import write_json

    version = require_tensorrt_llm()
    write_json(arguments.output, {"tensorrt_llm": version, "builder": builder_path()})


if __name__ == "__main__":
    run_cli(main)
