#!/usr/bin/env python3
"""Shows what this machine has, and which targets can be built and run on it.

    snakemake preflight

calls it for the targets of config.yaml, and jobs that use GPUs call it before the first of them
starts on a machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli.console import run_cli
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import write_json

if TYPE_CHECKING:
    from rich.console import Console

    from mpt_trt.workflow.preflight import Machine, Needs, Verdict


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--needs", default="[]", help="JSON list of targets and what they need, from the workflow"
    )
    parser.add_argument(
        "--once",
        type=Path,
        metavar="FOLDER",
        help="record what was found in FOLDER/{host}.json; do nothing where that is there already",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    once = arguments.once and arguments.once / f"{platform.node()}.json"
    if once and once.exists():
        return
    from rich.console import Console

    from mpt_trt.workflow import preflight

    targets = read_needs(arguments.needs)
    machine = preflight.inspect(Path.cwd())
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    show_machine(machine, console)
    verdicts = {needs.target: preflight.judge(needs, machine) for needs in targets}
    if verdicts:
        show_verdicts(verdicts, console)
    if once:
        verdict_fields = {target: asdict(verdict) for target, verdict in verdicts.items()}
        write_json(once, {"machine": asdict(machine), "targets": verdict_fields})


def read_needs(text: str) -> list[Needs]:
    """Raises MptTrtError when `text` is not what the workflow passes."""
    from mpt_trt.workflow.preflight import Needs

    try:
        entries = [Needs(**entry) for entry in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise MptTrtError(f"--needs: not a JSON list of what targets need: {error}") from None
    return entries


def show_machine(machine: Machine, console: Console) -> None:
    from rich.table import Table

    from mpt_trt.engines.memory import GB

    table = Table(title=f"This machine: {machine.host}", show_header=False, title_justify="left")
    table.add_row("processor", f"{machine.cores} cores, {machine.memory / GB:.0f} GB of memory")
    table.add_row("free disk", f"{machine.free_disk / GB:.0f} GB")
    for index, gpu in enumerate(machine.gpus):
        details = f"{gpu.memory / GB:.0f} GB, compute capability {gpu.compute_capability}"
        table.add_row(f"GPU {index}", f"{gpu.name}, {details}")
    if not machine.gpus:
        table.add_row("GPU", "none")
    packages = {
        "driver": machine.driver,
        "TensorRT": machine.tensorrt,
        "TensorRT-RTX": machine.tensorrt_rtx,
        "ONNX Runtime": machine.onnxruntime,
        "MPI": machine.mpi,
        "NCCL (nccl4py)": machine.nccl,
        "ModelOpt": machine.modelopt,
    }
    for name, version in packages.items():
        table.add_row(name, version or "none")
    console.print(table)


def show_verdicts(verdicts: dict[str, Verdict], console: Console) -> None:
    from rich.table import Table

    table = Table("target", "can be built", "can be run", title="Targets", title_justify="left")
    for target, verdict in verdicts.items():
        table.add_row(target, in_words(verdict.build), running_in_words(verdict))
    console.print(table)


def in_words(missing: tuple[str, ...]) -> str:
    return f"no; missing: {'; '.join(missing)}" if missing else "yes"


def running_in_words(verdict: Verdict) -> str:
    if verdict.run or not verdict.tensorrt:
        return in_words(verdict.run)
    return f"by ONNX Runtime; for TensorRT missing: {'; '.join(verdict.tensorrt)}"


if __name__ == "__main__":
    run_cli(main)
