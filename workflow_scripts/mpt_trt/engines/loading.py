"""Opens an engine directory with the runtime that fits this machine, and says which and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpt_trt.engines import gpus
from mpt_trt.engines.manifest import Manifest, read_manifest
from mpt_trt.engines.packages import installed_package
from mpt_trt.errors import MptTrtError
from mpt_trt.generation import StepModel

RUNTIMES = ("auto", "tensorrt", "onnxruntime")


@dataclass(frozen=True)
class LoadedEngine:
    """A rank's engine, ready to step.

    max_logits: most logit rows of one step, None for no limit.
    runtime: what runs it. stood_in_because: why that is not TensorRT; None when it is.
    """

    model: StepModel
    manifest: Manifest
    max_logits: int | None
    runtime: str
    stood_in_because: str | None


def load_engine(engine_dir: Path, runtime: str = "auto", num_threads: int = 0) -> LoadedEngine:
    """Loads a one-rank engine directory.

    runtime: `tensorrt` runs the plan, or fails saying why it cannot; `onnxruntime` runs the network
    that lies beside it; `auto` falls back from the first to the second.
    num_threads: CPU threads of ONNX Runtime, 0 for one a core.

    Raises MptTrtError when the directory is incomplete or the runtime cannot load it.
    """
    manifest = read_manifest(engine_dir)
    obstacle = "asked for" if runtime == "onnxruntime" else tensorrt_obstacle(manifest)
    if obstacle is None:
        from mpt_trt.engines.tensorrt_runtime import TensorRtEngine

        engine = TensorRtEngine(engine_dir, manifest, rank=0)
        return LoadedEngine(engine, manifest, engine.max_logits, engine.description, None)
    if runtime == "tensorrt":
        raise MptTrtError(f"{engine_dir}: TensorRT cannot run this engine here: {obstacle}")
    from mpt_trt.engines.onnx_runtime import OnnxRuntimeEngine

    stand_in = OnnxRuntimeEngine(engine_dir, manifest, rank=0, num_threads=num_threads)
    return LoadedEngine(stand_in, manifest, None, stand_in.description, obstacle)


def tensorrt_obstacle(manifest: Manifest) -> str | None:
    """Why TensorRT cannot run the plan on this machine; None when nothing speaks against it."""
    found = gpus.compute_capabilities()
    wanted = manifest.builder.compute_capabilities
    if not found:
        return f"no NVIDIA GPU found; the plan is for compute capability {', '.join(wanted)}"
    if found[0] not in wanted:
        return (
            f"this GPU has compute capability {found[0]}, the plan is for {', '.join(wanted)}; "
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
    return None
