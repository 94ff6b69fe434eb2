"""Print the result of a smoke test."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpt_trt.evaluation.smoke_result import read_smoke_result


def run(options: argparse.Namespace) -> None:
    result = read_smoke_result(options.result)
    builder, distance, speed = result.builder, result.distance, result.speed
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    engines = ", ".join(str(Path(result.engine_dir) / name) for name in result.engines)
    rows = {
        "Prompt": result.prompt,
        "Text": result.text,
        "Speed": f"{speed.decode_tokens_per_s:.0f} tokens/s "
        f"(prompt: {speed.prefill_tokens_per_s:.0f} tokens/s)",
        "Run by": result.runtime,
        "Not by TensorRT": result.fallback_reason,
        "Distance": f"largest {distance.max_abs:.2g}, mean KL {distance.mean_kl:.2g} nats, "
        f"same top token {distance.top1:.1%}, over {distance.positions} positions",
        "Reference": result.reference,
        "Engine": f"{engines} ({builder.package} {builder.version} for GPUs of compute "
        f"capability {', '.join(builder.compute_capabilities)})",
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(Text(name, style="bold"), Text(value))
    Console().print(table)
