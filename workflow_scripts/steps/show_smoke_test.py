#!/usr/bin/env python3
"""Prints the result of a smoke test for people."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli.console import run_cli


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="JSON file that smoke_test.py wrote")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mpt_trt.system.files import read_json

    result = read_json(arguments.result)
    distance, builder = result["distance"], result["builder"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    engines = ", ".join(str(Path(result["engine_dir"]) / name) for name in result["engines"])
    capabilities = ", ".join(builder["compute_capabilities"])
    rows = {
        "Prompt": result["prompt"],
        "Text": result["text"],
        "Speed": f"{result['decode_tokens_per_s']:.0f} tokens/s (prompt: "
        f"{result['prefill_tokens_per_s']:.0f} tokens/s)",
        "Run by": result["runtime"],
        "Not by TensorRT": result["fallback_reason"],
        "Distance": f"largest {distance['max_abs']:.2g}, mean KL {distance['mean_kl']:.2g} nats, "
        f"same top token {distance['top1']:.1%}, over {distance['positions']} positions",
        "Reference": result["reference"],
        "Engine": f"{engines} ({builder['package']} {builder['version']} for GPUs of compute "
        f"capability {capabilities})",
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(Text(name, style="bold"), Text(value))
    Console().print(table)


if __name__ == "__main__":
    run_cli(main)
