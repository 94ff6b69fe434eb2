"""Run as every rank of engines on simulated GPUs, under ONNX Runtime's CUDA engine.

cuda_ranks_driver.py record FOLDER ENGINE             FOLDER/rank{r}.npz: tokens and logits
cuda_ranks_driver.py compare FOLDER ENGINE BOUND      the same, and steps against the CPU's
cuda_ranks_driver.py signal FOLDER ENGINE NAME        as mpi_driver
cuda_ranks_driver.py memory FOLDER ENGINE             rank 1 has no GPU memory left for the cache
cuda_ranks_driver.py choose FOLDER ENGINE             GPUs that cannot be used by the ranks
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mpt_trt.cli.console import run_cli
from mpt_trt.engines.load import load_engine
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.engines.onnxruntime.cpu_engine import OnnxRuntimeEngine
from mpt_trt.engines.onnxruntime.cuda import collectives
from mpt_trt.engines.onnxruntime.cuda.engine import OnnxCudaEngine
from mpt_trt.system import gpus
from mpt_trt.system.mpi import communicator
from support import mpi_driver
from support.simulated.install import Simulation, installed, installed_onnxruntime_gpu
from support.step_scenario import require_same_steps, require_same_text


def record(folder: Path, path: Path, bound: float | None, simulation: Simulation) -> None:
    theirs = None if bound is None else load_engine(path, "onnxruntime", num_threads=1).model
    with installed_onnxruntime_gpu(simulation):
        engine = load_engine(path, "onnxruntime", num_threads=1)
        assert isinstance(engine.model, OnnxCudaEngine)
        if theirs is not None and bound is not None:
            vocab_size = engine.manifest.spec.config.vocab_size
            require_same_steps(engine.model, theirs, vocab_size, bound)
            require_same_text(engine.model, theirs, vocab_size)
        rank = engine.communicator.rank
        np.savez(folder / f"rank{rank}.npz", **mpi_driver.record(engine))
        # Bound names would keep it alive while the simulation looks for leaks.
        del engine
    assert simulation.cuda.launches, "no step was captured"


def run_out_of_memory(path: Path, simulation: Simulation) -> None:
    engine = load_engine(path, "onnxruntime", num_threads=1)
    if engine.communicator.rank == 1:
        simulation.cuda.memory.capacity = 0
    mpi_driver.record(engine)
    print("generated to the end")


def choose(path: Path) -> None:
    """A reason of one rank makes all use the CPU; GPUs that are too few are an error."""
    rank = communicator(2).rank
    with pytest.MonkeyPatch.context() as patch:
        reason = "there is no C compiler" if rank == 1 else None
        patch.setattr(collectives, "collectives_obstacle", lambda: reason)
        engine = load_engine(path, "onnxruntime", num_threads=1)
        assert isinstance(engine.model, OnnxRuntimeEngine)
        assert engine.fallback_reason == (
            "ONNX Runtime was requested; ONNX Runtime cannot use the GPUs (rank 1: there is no C "
            "compiler)"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpus, "identifiers", lambda: ("GPU-0",))
        load_engine(path, "onnxruntime", num_threads=1)


def main() -> None:
    action, folder, name, *rest = sys.argv[1:]
    path = Path(name)
    ranks = communicator(read_manifest(path).spec.tp_size)
    with installed(ranks=ranks) as simulation:
        if action in ("record", "compare"):
            record(Path(folder), path, float(rest[0]) if rest else None, simulation)
            return
        with installed_onnxruntime_gpu(simulation):
            if action == "signal":
                mpi_driver.send_signal(Path(folder), path, rest[0])
            elif action == "memory":
                run_out_of_memory(path, simulation)
            else:
                choose(path)


if __name__ == "__main__":
    run_cli(main)
