"""Show what this machine has, and which targets it can build and run."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from mpt_trt.engines.memory import GB
from mpt_trt.engines.spec import BuilderChoice
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import write_json
from mpt_trt.workflow import preflight
from mpt_trt.workflow.config_sources import ConfigSources
from mpt_trt.workflow.job_resources import JobResources
from mpt_trt.workflow.launch import Launch
from mpt_trt.workflow.plan import Plan
from mpt_trt.workflow.preflight import Inventory, Needs, Verdict
from mpt_trt.workflow.settings import parse_settings


def run(options: argparse.Namespace) -> None:
    once = options.once and options.once / f"{platform.node()}.json"
    if once and once.exists():
        return
    targets = [*read_needs(options.needs), *asked_needs(options)]
    inventory = preflight.inspect(Path.cwd())
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    show_machine(inventory, console)
    verdicts = {needs.target: preflight.judge(needs, inventory) for needs in targets}
    if verdicts:
        show_verdicts(verdicts, console)
    if once:
        verdict_fields = {target: asdict(verdict) for target, verdict in verdicts.items()}
        write_json(once, {**asdict(inventory), "targets": verdict_fields})


def asked_needs(options: argparse.Namespace) -> list[Needs]:
    """Computes the needs of the targets, and of the model and variant, that the options name.

    Raises MptTrtError for unknown ones.
    """
    if (options.model is None) != (options.variant is None):
        raise MptTrtError("--model and --variant belong together; give both")
    names = list(options.targets)
    if options.model is not None:
        tp_size = options.tensor_parallelism
        names.append(f"trt_engines/{options.model}/{options.variant}/{tp_size}-gpu")
    if not names:
        return []
    here, shipped = Path("config.yaml"), options.repository / "config.yaml"
    config = options.configfile or (here if here.exists() else shipped)
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MptTrtError(f"{config}: cannot be read as configuration: {error}") from None
    settings = parse_settings(content or {}, ConfigSources((str(config),)))
    launch = Launch(JobResources(Plan(settings, options.repository)))
    return [launch.needs(name) for name in names]


def read_needs(text: str) -> list[Needs]:
    """Parses the needs; raises MptTrtError when `text` does not come from the workflow."""
    try:
        return [
            Needs(**entry | {"builder": BuilderChoice(**entry["builder"])})
            for entry in json.loads(text)
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise MptTrtError(f"--needs: not a JSON list of needs: {error!r}") from None


def show_machine(inventory: Inventory, console: Console) -> None:
    machine = inventory.machine
    table = Table(title=f"This machine: {inventory.host}", show_header=False, title_justify="left")
    table.add_row("processor", f"{machine.cores} cores, {machine.memory / GB:.0f} GB of memory")
    table.add_row("free disk", f"{inventory.free_disk / GB:.0f} GB")
    for index, gpu in enumerate(machine.gpus):
        details = f"{gpu.memory / GB:.0f} GB, compute capability {gpu.compute_capability}"
        table.add_row(f"GPU {index}", f"{gpu.name}, {details}")
    if not machine.gpus:
        table.add_row("GPU", "none")
    packages = {
        "driver": inventory.driver,
        "TensorRT": inventory.tensorrt,
        "TensorRT-RTX": inventory.tensorrt_rtx,
        "ONNX Runtime": inventory.onnxruntime,
        "MPI": inventory.mpi,
        "NCCL (nccl4py)": inventory.nccl,
        "C compiler": inventory.compiler,
        "ModelOpt": inventory.modelopt,
    }
    for name, version in packages.items():
        table.add_row(name, version or "none")
    console.print(table)


def show_verdicts(verdicts: dict[str, Verdict], console: Console) -> None:
    columns = ("target", "builds here", "runs here")
    table = Table(*columns, title="Targets", title_justify="left", show_lines=True)
    for target, verdict in verdicts.items():
        table.add_row(target, building_in_words(verdict), running_in_words(verdict))
    console.print(table)


def building_in_words(verdict: Verdict) -> str:
    return f"no: needs {'; '.join(verdict.build)}" if verdict.build else "yes"


def running_in_words(verdict: Verdict) -> str:
    """Names the runtime that would run it, and in further lines the needs of the other ones."""
    if not verdict.tensorrt:
        return "yes, with TensorRT"
    needs = [f"TensorRT needs {'; '.join(verdict.tensorrt)}"]
    if not verdict.onnxruntime_gpu:
        return "\n".join(["yes, with ONNX Runtime on GPUs", *needs])
    needs.append(f"ONNX Runtime on GPUs needs {'; '.join(verdict.onnxruntime_gpu)}")
    if not verdict.run:
        return "\n".join(["yes, with ONNX Runtime on the CPU", *needs])
    return "\n".join(["no", *needs, f"ONNX Runtime on the CPU needs {'; '.join(verdict.run)}"])
