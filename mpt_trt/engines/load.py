"""Loads an engine directory with the runtime that fits this machine.

A runtime is imported only when it is chosen: its packages are optional and take long to import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mpt_trt.engines.interface import JoiningModel, RowModel
from mpt_trt.engines.manifest import Manifest, check_content, read_manifest
from mpt_trt.engines.memory import gpu_obstacle
from mpt_trt.engines.onnxruntime.cpu_settings import Activations, CpuSettings
from mpt_trt.engines.spec import RUNTIMES, EngineSpec
from mpt_trt.engines.tensorrt.packages import installed_package
from mpt_trt.errors import MptTrtError, SharedError
from mpt_trt.system import gpus
from mpt_trt.system.json_text import shown
from mpt_trt.system.mpi import Communicator, communicator
from mpt_trt.system.rank_gpus import own_gpu

if TYPE_CHECKING:
    from mpt_trt.engines.onnxruntime.cpu_engine import OnnxRuntimeEngine
    from mpt_trt.engines.onnxruntime.cuda.engine import OnnxCudaEngine
    from mpt_trt.engines.tensorrt.engine import TensorRtEngine


@dataclass(frozen=True)
class LoadedEngine:
    """A rank's engine, ready to step.

    max_logits: maximum number of logit rows per step; None for no limit. runtime: name and version.
    fallback_reason: why the runtime is not TensorRT; None when it is.
    """

    model: RowModel
    manifest: Manifest
    max_logits: int | None
    runtime: str
    fallback_reason: str | None
    communicator: Communicator | None

    @property
    def is_first_rank(self) -> bool:
        """Returns whether this process prints and writes the results of the engine."""
        return self.communicator is None or self.communicator.rank == 0


def load_engine(
    engine_dir: Path,
    runtime: str = "auto",
    num_threads: int = 0,
    activations: Activations = "exact",
    is_trusted: bool = False,
) -> LoadedEngine:
    """Loads an engine directory or, if it has several ranks, this process's rank of it.

    runtime: `tensorrt` runs the plan, and fails if it cannot; `onnxruntime` runs the network;
    `auto` prefers the plan and falls back to the network. num_threads: CPU threads of ONNX Runtime;
    0 for all cores, which the ranks share. activations: setting of ONNX Runtime on a CPU; see
    `Activations`. is_trusted: files are not compared with the recorded hashes.

    Raises MptTrtError, on all ranks if on one, when the directory is incomplete, the runtime cannot
    load it or has another name, or the number of processes differs from the number of ranks.
    """
    if runtime not in RUNTIMES:
        raise MptTrtError(f"runtime = {shown(runtime)}: one of {', '.join(RUNTIMES)} is possible")
    manifest = read_manifest(engine_dir)
    ranks = communicator(manifest.spec.tp_size)
    if ranks is not None and num_threads == 0:
        num_threads = ranks.num_cores()
    cpu = CpuSettings(num_threads, activations)

    def choose() -> _Runtime:
        return _choose_runtime(engine_dir, manifest, runtime)

    def load(chosen: _Runtime) -> LoadedEngine:
        return _load_rank(engine_dir, manifest, chosen, cpu, ranks, is_trusted)

    return load(choose()) if ranks is None else _load_together(choose, load, ranks)


@dataclass(frozen=True)
class _Runtime:
    """A runtime, and the reason why it is not TensorRT; None if it is."""

    kind: Literal["TensorRT", "ONNX Runtime on a GPU", "ONNX Runtime on a CPU"]
    fallback_reason: str | None = None


def _choose_runtime(engine_dir: Path, manifest: Manifest, requested: str) -> _Runtime:
    obstacle = (
        "ONNX Runtime was requested" if requested == "onnxruntime" else tensorrt_obstacle(manifest)
    )
    if obstacle is None:
        return _Runtime("TensorRT")
    if requested == "tensorrt":
        raise MptTrtError(f"{engine_dir}: TensorRT cannot run this engine here: {obstacle}")
    if _has_cuda_provider():
        return _Runtime("ONNX Runtime on a GPU", obstacle)
    return _Runtime("ONNX Runtime on a CPU", obstacle)


def _load_together(
    choose: Callable[[], _Runtime],
    load: Callable[[_Runtime], LoadedEngine],
    ranks: Communicator,
) -> LoadedEngine:
    # A rank that fails must not leave other ranks waiting.
    chosen = ranks.agree(choose)
    _require_same(ranks, chosen.kind)
    if chosen.kind == "ONNX Runtime on a GPU":
        chosen = _with_collectives(chosen, ranks)
    if chosen.kind != "ONNX Runtime on a CPU":
        from mpt_trt.engines.cuda.device import use_only

        own = own_gpu(ranks)
        ranks.agree(lambda: use_only(own))
    engine = ranks.agree(lambda: load(chosen))
    _require_same(ranks, engine.runtime)
    if isinstance(engine.model, JoiningModel):
        ranks.agree(lambda: engine.model.join(ranks))
    return engine


def _with_collectives(chosen: _Runtime, ranks: Communicator) -> _Runtime:
    """Replaces the GPU with the CPU if the ranks cannot communicate through their GPUs."""
    from mpt_trt.engines.onnxruntime.cuda.collectives import collectives_obstacle

    for rank, obstacle in enumerate(ranks.exchange(collectives_obstacle())):
        if obstacle is not None:
            failed = f"ONNX Runtime cannot use the GPUs (rank {rank}: {obstacle})"
            reason = f"{chosen.fallback_reason}; {failed}"
            return _Runtime("ONNX Runtime on a CPU", reason)
    return chosen


def _require_same(ranks: Communicator, runtime: str) -> None:
    runtimes = ranks.exchange(runtime)
    if len(set(runtimes)) > 1:
        by_rank = ", ".join(f"{rank}: {runtime}" for rank, runtime in enumerate(runtimes))
        raise SharedError(f"the ranks have different runtimes ({by_rank}); use one for all of them")


def _load_rank(
    engine_dir: Path,
    manifest: Manifest,
    chosen: _Runtime,
    cpu: CpuSettings,
    ranks: Communicator | None,
    is_trusted: bool,
) -> LoadedEngine:
    rank = 0 if ranks is None else ranks.rank
    files = manifest.ranks[rank]
    if not is_trusted:
        names = [files.engine] if chosen.kind == "TensorRT" else files.network_files
        check_content(engine_dir, files, *names)
    model: TensorRtEngine | OnnxCudaEngine | OnnxRuntimeEngine
    if chosen.kind == "TensorRT":
        from mpt_trt.engines.tensorrt.engine import TensorRtEngine

        model = TensorRtEngine(engine_dir, manifest, rank)
    elif chosen.kind == "ONNX Runtime on a GPU":
        from mpt_trt.engines.onnxruntime.cuda.engine import OnnxCudaEngine

        model = OnnxCudaEngine(engine_dir, manifest, rank)
    else:
        from mpt_trt.engines.onnxruntime.cpu_engine import OnnxRuntimeEngine

        model = OnnxRuntimeEngine(engine_dir, manifest, cpu, ranks)
    reason, limit = chosen.fallback_reason, model.max_logits
    return LoadedEngine(model, manifest, limit, model.description, reason, ranks)


def _has_cuda_provider() -> bool:
    """Returns whether the installed ONNX Runtime supports GPUs and this machine has one."""
    import onnxruntime

    installed = onnxruntime.get_available_providers()
    return "CUDAExecutionProvider" in installed and bool(gpus.compute_capabilities())


def tensorrt_obstacle(manifest: Manifest) -> str | None:
    """Reason why TensorRT cannot run the plan on this machine; None if it can."""
    present = gpus.compute_capabilities()
    wanted = manifest.builder.compute_capabilities
    if not present:
        return f"no NVIDIA GPU found; the plan is for compute capability {', '.join(wanted)}"
    if present[0] not in wanted:
        return (
            f"this GPU has compute capability {present[0]}, the plan is for {', '.join(wanted)}; "
            "add it to compute_capabilities or build here"
        )
    package = installed_package(manifest.builder.package)
    if package is None:
        return f"{manifest.builder.package} {manifest.builder.version} is not installed"
    if package.version != manifest.builder.version:
        return (
            f"the plan was built by {package.module} {manifest.builder.version}, installed is "
            f"{package.version}; build the engine again"
        )
    return _memory_obstacle(manifest.spec)


def _memory_obstacle(spec: EngineSpec) -> str | None:
    sizes = gpus.memory_sizes()
    return gpu_obstacle(spec, min(sizes)) if sizes else None
