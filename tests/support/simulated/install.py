"""Replaces TensorRT, CUDA and NCCL with the simulation."""

from __future__ import annotations

import ctypes
import gc
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import onnxruntime
import pytest

from mpt_trt.engines.build.build import build_engine
from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.engines.cuda import device, graphs, memory, steps_ahead
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.engines.onnxruntime.cuda import engine as onnx_engine
from mpt_trt.engines.onnxruntime.cuda import uploaded_weights
from mpt_trt.engines.onnxruntime.cuda.session import PROVIDER
from mpt_trt.engines.rank_descriptions import (
    engine_name,
    network_name,
    read_network_hash,
    write_plan_description,
)
from mpt_trt.engines.spec import BuilderChoice, BuilderInfo
from mpt_trt.engines.tensorrt.packages import installed_package
from mpt_trt.system import gpus
from mpt_trt.system.files import content_hash
from mpt_trt.system.mpi import Communicator
from support.simulated.cuda import SimulatedCuda
from support.simulated.cuda_session import SimulatedCudaSession
from support.simulated.nccl import LIBRARY, make_core, make_library
from support.simulated.network import RankNetwork
from support.simulated.rules import Book
from support.simulated.tensorrt import SimulatedTensorRt, World

# With kernels for fp8.
CAPABILITY = "8.9"
PLAN_MARK = b"simulated plan of "
USERS_OF_CUDA = (device, graphs, memory, steps_ahead, onnx_engine, uploaded_weights)


@dataclass
class Simulation:
    """A machine with simulated GPUs.

    plans: engine directories by the content of their plans, for plans that TensorRT has built.
    is_clean_at_end: whether the end of `installed` fails after a broken rule or a leak.
    real_module: TensorRT's, which builds plans.
    """

    capability: str = CAPABILITY
    book: Book = field(default_factory=Book)
    plans: dict[bytes, tuple[Path, int]] = field(default_factory=dict)
    is_clean_at_end: bool = True
    real_module: ModuleType | None = None

    def __post_init__(self) -> None:
        self.cuda = SimulatedCuda(self.book)
        self.world = World(self.book, self.cuda, self._open_plan)

    def register(self, engine_dir: Path) -> None:
        """Lets the plans of an engine directory be loaded, which TensorRT has built."""
        for rank, files in enumerate(read_manifest(engine_dir).ranks):
            self.plans[(engine_dir / files.engine).read_bytes()] = (engine_dir, rank)

    def _open_plan(self, content: bytes) -> RankNetwork:
        if content in self.plans:
            folder, rank = self.plans[content]
        elif content.startswith(PLAN_MARK):
            path = Path(content.removeprefix(PLAN_MARK).decode())
            folder, rank = path.parent, int(path.stem.removeprefix("rank"))
        else:
            raise ValueError("magic tag does not match (simulated)")
        manifest = read_manifest(folder)
        if self.capability not in manifest.builder.compute_capabilities:
            raise ValueError(f"does not support compute capability {self.capability} (simulated)")
        return RankNetwork(folder / network_name(rank), manifest.spec)

    def require_clean(self) -> None:
        """Fails when a rule was broken, or something was not released."""
        gc.collect()
        assert not self.book.violations, self.book.violations
        leaks = self.cuda.leaks()
        assert not leaks and not self.world.contexts and not self.world.communicators, (
            leaks,
            self.world.contexts,
            self.world.communicators,
        )


@contextmanager
def installed(
    capability: str = CAPABILITY,
    ranks: Communicator | None = None,
    users_of_cuda: tuple[ModuleType, ...] = USERS_OF_CUDA,
) -> Iterator[Simulation]:
    """A machine with simulated GPUs while the block runs; fails when it leaves anything behind.

    ranks: MPI's communicator, for engines of several ranks. users_of_cuda: modules that have
    imported CUDA's runtime as `cudart`.
    """
    simulation = Simulation(capability)
    module = SimulatedTensorRt(simulation.world)
    simulation.real_module = sys.modules[module.__name__]
    nccl = types.ModuleType("nccl")
    nccl.core = make_core(simulation.world, ranks)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for user in users_of_cuda:
            patch.setattr(user, "cudart", simulation.cuda)
        patch.setitem(sys.modules, module.__name__, module)  # type: ignore[arg-type]
        patch.setitem(sys.modules, "nccl", nccl)
        patch.setitem(sys.modules, "nccl.core", nccl.core)
        patch.setattr(gpus, "compute_capabilities", lambda: (capability,))
        patch.setattr(gpus, "memory_sizes", lambda: (simulation.cuda.memory.capacity,))
        patch.setattr(gpus, "names", lambda: ("Simulated GPU",))
        identifiers = tuple(f"GPU-{i}" for i in range(1 if ranks is None else ranks.size))
        patch.setattr(gpus, "identifiers", lambda: identifiers)
        # A rank changes it.
        patch.setenv(gpus.VISIBLE, ",".join(identifiers))
        library, load = make_library(simulation.world), ctypes.CDLL
        patch.setattr(
            ctypes,
            "CDLL",
            lambda name, *more, **options: (
                library if name == LIBRARY else load(name, *more, **options)
            ),
        )
        # Existing objects need not be searched for what the block drops.
        gc.freeze()
        try:
            yield simulation
            if simulation.is_clean_at_end:
                simulation.require_clean()
        finally:
            # Buffers are freed by the runtime that made them.
            gc.collect()
            gc.unfreeze()


@contextmanager
def installed_onnxruntime_gpu(simulation: Simulation) -> Iterator[None]:
    """Lets ONNX Runtime run networks on the simulated GPUs while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        providers = [PROVIDER, *onnxruntime.get_available_providers()]
        patch.setattr(onnxruntime, "get_available_providers", lambda: providers)
        patch.setattr(onnxruntime, "preload_dlls", lambda: None)
        patch.setattr(SimulatedCudaSession, "cuda", simulation.cuda, raising=False)
        patch.setattr(onnx_engine, "CudaSession", SimulatedCudaSession)
        yield


def build_simulated(inputs: NetworkInputs, target: Path) -> Path:
    """The engine directory `target` with plans that only the simulation can load."""
    package = installed_package("tensorrt_rtx")
    assert package is not None
    builder = BuilderInfo(package.module, package.version, (CAPABILITY,))

    def write_plans(folder: Path, _: BuilderChoice, tp_size: int) -> None:
        for rank in range(tp_size):
            plan = folder / engine_name(rank)
            plan.write_bytes(PLAN_MARK + str(target / network_name(rank)).encode())
            network_hash = read_network_hash(folder, rank)
            write_plan_description(plan, content_hash(plan), network_hash, builder)

    build_engine(inputs, BuilderChoice("tensorrt_rtx", (CAPABILITY,)), target, write_plans)
    return target
