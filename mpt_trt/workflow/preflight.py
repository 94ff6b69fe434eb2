"""Compares the needs of an engine with a machine.

Builds and loads nothing; versions come from the packages' metadata. Problems that only a build or a
run shows, such as a driver that is too old, are not detected.
"""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mpt_trt.engines.memory import GB
from mpt_trt.engines.spec import TENSORRT_RTX, BuilderChoice
from mpt_trt.engines.tensorrt.packages import choose_package, installed_package
from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpus
from mpt_trt.system.compiled import find_compiler
from mpt_trt.system.machine import Machine, describe_machine


@dataclass(frozen=True)
class Inventory:
    """A machine and the versions of its software; None for missing software.

    free_disk: bytes. compiler: path of the C compiler.
    """

    host: str
    machine: Machine
    free_disk: int
    driver: str | None
    tensorrt: str | None
    tensorrt_rtx: str | None
    onnxruntime: str | None
    onnxruntime_gpu: str | None
    compiler: str | None
    nccl: str | None
    mpi: str | None
    modelopt: str | None


@dataclass(frozen=True)
class Needs:
    """Resources of a target, in bytes.

    builder: as configured. gpu_memory: memory of each rank. build_memory, run_memory: host memory
    of a build and of a run under ONNX Runtime. is_calibrated: whether it needs a calibration.
    """

    target: str
    builder: BuilderChoice
    ranks: int
    gpu_memory: int
    build_memory: int
    run_memory: int
    disk: int
    is_calibrated: bool


@dataclass(frozen=True)
class Verdict:
    """Missing parts, in words that follow `needs`; empty if nothing is missing.

    build: for building the target. tensorrt: for running its plan. onnxruntime_gpu: for running its
    network on GPUs under ONNX Runtime. run: for running it with any runtime; ONNX Runtime on a CPU
    is the last fallback.
    """

    build: tuple[str, ...]
    tensorrt: tuple[str, ...]
    onnxruntime_gpu: tuple[str, ...]
    run: tuple[str, ...]


def inspect(folder: Path) -> Inventory:
    """Describes this machine and its software. folder: folder of the artifacts."""
    return Inventory(
        host=platform.node(),
        machine=describe_machine(),
        free_disk=shutil.disk_usage(folder).free,
        driver=gpus.driver_version(),
        onnxruntime=_version("onnxruntime") or _version("onnxruntime-gpu"),
        onnxruntime_gpu=_version("onnxruntime-gpu"),
        compiler=find_compiler(),
        nccl=_version("nccl4py"),
        mpi=_mpi(),
        modelopt=_version("nvidia-modelopt"),
        tensorrt=_builder_version("tensorrt"),
        tensorrt_rtx=_builder_version(TENSORRT_RTX),
    )


def _builder_version(module: str) -> str | None:
    package = installed_package(module)
    return None if package is None else package.version


def judge(needs: Needs, inventory: Inventory) -> Verdict:
    """Finds missing parts for building or running a target on a machine."""
    ranks = tuple(_missing_for_ranks(needs, inventory))
    tensorrt = (*_missing_for_tensorrt(needs, inventory), *ranks)
    on_gpus = (*_missing_for_onnxruntime_gpu(needs, inventory), *ranks)
    fallback = (*_missing_for_onnxruntime(needs, inventory), *ranks)
    build = tuple(_missing_for_build(needs, inventory))
    return Verdict(build, tensorrt, on_gpus, tensorrt and on_gpus and fallback)


def _missing_for_build(needs: Needs, inventory: Inventory) -> list[str]:
    missing = []
    try:
        module = choose_package(needs.builder.backend, bool(inventory.machine.gpus)).module
        if module == "tensorrt" and not inventory.machine.gpus:
            missing.append("a GPU, on which tensorrt builds")
    except MptTrtError as error:
        missing.append(f"a builder ({error})")
    if needs.build_memory > inventory.machine.memory:
        missing.append(_too_little("memory", needs.build_memory, inventory.machine.memory))
    if needs.disk > inventory.free_disk:
        missing.append(_too_little("free disk space", needs.disk, inventory.free_disk))
    if needs.is_calibrated and inventory.modelopt is None:
        missing.append("the package nvidia-modelopt, for calibration")
    return missing


def _missing_for_tensorrt(needs: Needs, inventory: Inventory) -> list[str]:
    missing = _missing_gpus(needs, inventory)
    if _builder(needs, inventory) == TENSORRT_RTX:
        capabilities = {gpu.compute_capability for gpu in inventory.machine.gpus}
        if others := capabilities - set(needs.builder.compute_capabilities):
            missing.append(f"{', '.join(sorted(others))} among compute_capabilities in config.yaml")
    return missing


def _missing_for_onnxruntime_gpu(needs: Needs, inventory: Inventory) -> list[str]:
    missing = _missing_gpus(needs, inventory)
    if inventory.onnxruntime_gpu is None:
        missing.append("the package onnxruntime-gpu")
    if needs.ranks > 1 and inventory.compiler is None:
        missing.append("a C compiler")
    return missing


def _missing_gpus(needs: Needs, inventory: Inventory) -> list[str]:
    """GPUs, their memory, and the connection of ranks on them."""
    found = inventory.machine.gpus
    if len(found) < needs.ranks:
        wanted = "1 GPU" if needs.ranks == 1 else f"{needs.ranks} GPUs"
        memory = f"with {needs.gpu_memory / GB:.1f} GB of memory"
        return [f"{wanted} {memory} ({len(found) or 'none'} found)"]
    missing = []
    smallest = min(gpu.memory for gpu in found)
    if smallest < needs.gpu_memory:
        missing.append(_too_little("GPU memory", needs.gpu_memory, smallest))
    if needs.ranks > 1 and inventory.nccl is None:
        missing.append("the package nccl4py")
    return missing


def _missing_for_onnxruntime(needs: Needs, inventory: Inventory) -> list[str]:
    if inventory.onnxruntime is None:
        return ["the package onnxruntime"]
    if needs.run_memory > inventory.machine.memory:
        return [_too_little("memory", needs.run_memory, inventory.machine.memory)]
    return []


def _missing_for_ranks(needs: Needs, inventory: Inventory) -> list[str]:
    return ["mpirun and mpi4py"] if needs.ranks > 1 and inventory.mpi is None else []


def _builder(needs: Needs, inventory: Inventory) -> str | None:
    try:
        return choose_package(needs.builder.backend, bool(inventory.machine.gpus)).module
    except MptTrtError:
        return None


def _too_little(what: str, needed: int, there: int) -> str:
    return f"{needed / GB:.1f} GB of {what} ({there / GB:.1f} GB available)"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _mpi() -> str | None:
    # pip installs mpirun next to python, which need not be on the PATH.
    on_path, own_folder = shutil.which("mpirun"), str(Path(sys.executable).parent)
    mpirun = on_path or shutil.which("mpirun", path=own_folder)
    if mpirun is None or (binding := _version("mpi4py")) is None:
        return None
    version = _version("openmpi")
    name = f"mpirun at {mpirun}" if version is None else f"Open MPI {version}"
    hint = "" if on_path else f"; start ranks with {mpirun}"
    return f"{name}, mpi4py {binding}{hint}"
