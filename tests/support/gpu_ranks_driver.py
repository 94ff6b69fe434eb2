"""Run as every rank of engines on real GPUs, under ONNX Runtime.

gpu_ranks_driver.py compare FOLDER BOUND ENGINE...   steps against the same ranks on the CPU;
                                                     FOLDER/{engine}.rank{r}.npz: tokens and logits
gpu_ranks_driver.py signal FOLDER ENGINE NAME        as mpi_driver
gpu_ranks_driver.py share FOLDER ENGINE              ranks that see the same GPU, among others
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from mpt_trt.cli.console import run_cli
from mpt_trt.engines.load import load_engine
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.engines.onnxruntime.cpu_engine import OnnxRuntimeEngine
from mpt_trt.engines.onnxruntime.cuda.engine import OnnxCudaEngine
from mpt_trt.system import gpus
from support import mpi_driver
from support.engines import ONE_THREAD
from support.step_scenario import make_steps, require_same_text


def compare(folder: Path, path: Path, bound: float) -> None:
    engine = load_engine(path, "onnxruntime")
    ours, ranks = engine.model, engine.communicator
    assert isinstance(ours, OnnxCudaEngine) and ranks is not None, engine.runtime
    manifest = read_manifest(path)
    spec = manifest.spec
    theirs = OnnxRuntimeEngine(path, manifest, ONE_THREAD, ranks)
    differences: list[float] = []
    vocab_size = spec.config.vocab_size
    make_steps(ours, theirs, vocab_size, lambda found, _: differences.append(found))
    if ranks.rank == 0:
        print(f"{path.name}: largest difference {max(differences):.2g}", flush=True)
    assert max(differences) <= bound, differences
    if spec.dtype == "float32":
        require_same_text(ours, theirs, vocab_size)
    np.savez(folder / f"{path.name}.rank{ranks.rank}.npz", **mpi_driver.record(engine))


def share(path: Path) -> None:
    """Rank 1 sees only the first of the GPUs that rank 0 sees."""
    visible = gpus.identifiers()
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    os.environ[gpus.VISIBLE] = ",".join(visible[:1] if rank else visible)
    load_engine(path, "onnxruntime")
    print("loaded")


def main() -> None:
    action, folder, *rest = sys.argv[1:]
    if action == "compare":
        for name in rest[1:]:
            compare(Path(folder), Path(name), float(rest[0]))
    elif action == "signal":
        mpi_driver.send_signal(Path(folder), Path(rest[0]), rest[1])
    else:
        share(Path(rest[0]))


if __name__ == "__main__":
    run_cli(main)
