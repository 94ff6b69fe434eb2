"""What a machine has, what an engine needs of it, and what is missing.

Neither builds nor loads anything; versions come from the packages' metadata. What only a build or a
run can show, such as a driver that is too old for a package, is not found here.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mpt_trt.engines.memory import GB
from mpt_trt.engines.tensorrt.packages import DISTRIBUTIONS, choose_package, installed_package
from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpus
from mpt_trt.system.machine import GIB, describe_machine


@dataclass(frozen=True)
class Gpu:
    """memory: in bytes. compute_capability: as "8.9"."""

    name: str
    memory: int
    compute_capability: str


@dataclass(frozen=True)
class Machine:
    """What a machine has; versions, or None for what is not there. memory, free_disk: in bytes."""

    host: str
    cores: int
    memory: int
    free_disk: int
    gpus: tuple[Gpu, ...]
    driver: str | None
    tensorrt: str | None
    tensorrt_rtx: str | None
    onnxruntime: str | None
    nccl: str | None
    mpi: str | None
    modelopt: str | None


@dataclass(frozen=True)
class Needs:
    """What a target needs. gpu_memory: of a rank; build_memory, disk: in bytes, too.

    backend, compute_capabilities: as in config.yaml.
    """

    target: str
    backend: str
    compute_capabilities: tuple[str, ...]
    ranks: int
    gpu_memory: int
    build_memory: int
    run_memory: int
    disk: int
    is_calibrated: bool


@dataclass(frozen=True)
class Verdict:
    """What is missing, in words; empty for nothing.

    build: to build the target. tensorrt: to run its plan. run: to run it at all, since ONNX Runtime
    may stand in.
    """

    build: tuple[str, ...]
    tensorrt: tuple[str, ...]
    run: tuple[str, ...]


def inspect(folder: Path) -> Machine:
    """This machine. folder: where the artifacts will lie."""
    machine = describe_machine()
    found = zip(gpus.names(), gpus.memory_sizes(), gpus.compute_capabilities(), strict=True)
    tensorrt = {module: installed_package(module) for module in DISTRIBUTIONS}
    versions = {module: package and package.version for module, package in tensorrt.items()}
    return Machine(
        host=platform.node(),
        cores=machine.cores,
        memory=round(machine.memory_gib * GIB),
        free_disk=shutil.disk_usage(folder).free,
        gpus=tuple(Gpu(*fields) for fields in found),
        driver=gpus.driver_version(),
        onnxruntime=_version("onnxruntime") or _version("onnxruntime-gpu"),
        nccl=_version("nccl4py"),
        mpi=_mpi(),
        modelopt=_version("nvidia-modelopt"),
        **versions,
    )


def judge(needs: Needs, machine: Machine) -> Verdict:
    """Whether a target can be built and run on a machine."""
    ranks = tuple(_missing_of_ranks(needs, machine))
    tensorrt = (*_missing_of_tensorrt(needs, machine), *ranks)
    stand_in = (*_missing_of_stand_in(needs, machine), *ranks)
    return Verdict(tuple(_missing_of_build(needs, machine)), tensorrt, tensorrt and stand_in)


def _missing_of_build(needs: Needs, machine: Machine) -> list[str]:
    found = []
    try:
        module = choose_package(needs.backend, bool(machine.gpus)).module
        if module == "tensorrt" and not machine.gpus:
            found.append("a GPU, on which tensorrt builds")
    except MptTrtError as error:
        found.append(str(error))
    if needs.build_memory > machine.memory:
        found.append(_too_little("memory", needs.build_memory, machine.memory))
    if needs.disk > machine.free_disk:
        found.append(_too_little("free disk space", needs.disk, machine.free_disk))
    if needs.is_calibrated and machine.modelopt is None:
        found.append("nvidia-modelopt, for calibration")
    return found


def _missing_of_tensorrt(needs: Needs, machine: Machine) -> list[str]:
    if len(machine.gpus) < needs.ranks:
        return [f"{needs.ranks} GPU(s); {len(machine.gpus)} found"]
    found = []
    smallest = min(gpu.memory for gpu in machine.gpus)
    if smallest < needs.gpu_memory:
        found.append(_too_little("GPU memory", needs.gpu_memory, smallest))
    if _builder(needs, machine) == "tensorrt_rtx":
        capabilities = {gpu.compute_capability for gpu in machine.gpus}
        if others := capabilities - set(needs.compute_capabilities):
            found.append(f"compute_capabilities {', '.join(sorted(others))} in config.yaml")
    if needs.ranks > 1 and machine.nccl is None:
        found.append("nccl4py")
    return found


def _missing_of_stand_in(needs: Needs, machine: Machine) -> list[str]:
    if machine.onnxruntime is None:
        return ["onnxruntime"]
    if needs.run_memory > machine.memory:
        return [_too_little("memory", needs.run_memory, machine.memory)]
    return []


def _missing_of_ranks(needs: Needs, machine: Machine) -> list[str]:
    return ["mpirun and mpi4py"] if needs.ranks > 1 and machine.mpi is None else []


def _builder(needs: Needs, machine: Machine) -> str | None:
    try:
        return choose_package(needs.backend, bool(machine.gpus)).module
    except MptTrtError:
        return None


def _too_little(what: str, needed: int, there: int) -> str:
    return f"{needed / GB:.1f} GB of {what}; {there / GB:.1f} GB are there"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _mpi() -> str | None:
    if shutil.which("mpirun") is None or (binding := _version("mpi4py")) is None:
        return None
    return f"{_mpi_name()}, mpi4py {binding}"


def _mpi_name() -> str:
    version = _version("openmpi")
    return f"mpirun at {shutil.which('mpirun')}" if version is None else f"Open MPI {version}"
