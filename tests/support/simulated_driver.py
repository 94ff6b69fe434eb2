"""Run by `test_simulated_ranks.py` as every rank of engines on the simulated TensorRT.

simulated_driver.py VOCAB_SIZE BOUND ENGINE...     compares each with its network
"""

from __future__ import annotations

import sys
from pathlib import Path

from mpt_trt.cli.console import run_cli
from mpt_trt.engines.load import load_engine
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.errors import SharedError
from mpt_trt.system.mpi import communicator
from support.simulated.install import Simulation, installed
from support.step_scenario import require_same_steps, require_same_text


def compare(engine_dir: Path, vocab_size: int, bound: float, simulation: Simulation) -> None:
    ours = load_engine(engine_dir, "tensorrt").model
    theirs = load_engine(engine_dir, "onnxruntime", num_threads=1).model
    require_same_steps(ours, theirs, vocab_size, bound)
    require_same_text(ours, theirs, vocab_size)
    assert simulation.cuda.launches, "no step was captured"


def require_shared_failure(engine_dir: Path, simulation: Simulation, rank: int) -> None:
    """A fault of one rank ends all of them with the same message."""
    if rank == 1:
        simulation.world.failing.add("create_execution_context")
    try:
        load_engine(engine_dir, "tensorrt")
    except SharedError as error:
        assert str(error).startswith("rank 1: tensorrt_rtx 1."), error
        assert "failed to create an execution context" in str(error), error
        return
    raise AssertionError("the engine was loaded")


def main() -> None:
    vocab_size, bound = int(sys.argv[1]), float(sys.argv[2])
    for name in sys.argv[3:]:
        ranks = communicator(read_manifest(Path(name)).spec.tp_size)
        with installed(ranks=ranks) as simulation:
            assert ranks is not None
            require_shared_failure(Path(name), simulation, ranks.rank)
            compare(Path(name), vocab_size, bound, simulation)
    print("the same")


if __name__ == "__main__":
    run_cli(main)
