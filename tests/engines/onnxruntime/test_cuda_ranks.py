"""Several ranks of ONNX Runtime's CUDA engine, as processes under a real MPI, on simulated GPUs.

The collectives are those of `collectives.c`; the simulation has NCCL's functions. The engines must
compute what the same networks do on a CPU, and generate the tokens of one rank.
"""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from engines.test_mpi import BOTH, PATIENCE_S, WHOLE, Engines, Finished, mpirun
from mpt_trt.engines.load import load_engine
from support import cuda_ranks_driver, mpi_driver
from support.processes import require_ended

# Another order of float32 sums, as a multiple of the logits' standard deviation.
BOUND = 2e-5


def drive(size: int, *arguments: object, **environment: str) -> Finished:
    # The script's folder must not be searched: it has modules of the names of packages.
    script = Path(cuda_ranks_driver.__file__)
    return mpirun(size, script, *arguments, PYTHONSAFEPATH="1", **environment)


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def alone(engines: Engines) -> dict[str, np.ndarray]:
    """Tokens and logits of one rank on a CPU."""
    return mpi_driver.record(load_engine(engines.make(1, "float32"), "onnxruntime", num_threads=1))


@pytest.mark.parametrize(
    ("size", "vocabulary", "action"),
    [(2, BOTH, ["compare", BOUND]), (2, WHOLE, ["record"]), (4, BOTH, ["record"])],
)
def test_ranks_compute_what_one_rank_does(size, vocabulary, action, engines, alone, tmp_path):
    name, *bound = action
    path = engines.make(size, "float32", vocabulary)
    finished = drive(size, name, tmp_path, path, *bound)
    assert finished.status == 0, finished.stdout + finished.stderr
    first, *others = (np.load(tmp_path / f"rank{rank}.npz") for rank in range(size))
    for name in ("greedy", "beams", "long", "batched"):
        assert np.array_equal(first[name], alone[name]), name
    for other in others:
        assert all(np.array_equal(first[name], other[name]) for name in other)


# --- ranks that fail -----------------------------------------------------------------------------


def require_one_error(finished: Finished, message: str) -> None:
    assert finished.status != 0
    assert "generated to the end" not in finished.stdout
    [error] = finished.errors
    assert error.startswith(message)


def require_ended_ranks(folder: Path) -> None:
    require_ended([int((folder / f"pid{rank}").read_text()) for rank in (0, 1)], within_s=5)


def test_a_rank_that_hangs_is_given_up(engines, tmp_path):
    engine = engines.make(2, "float32")
    patience = {"MPT_TRT_PATIENCE_SECONDS": str(PATIENCE_S)}
    finished = drive(2, "signal", tmp_path, engine, "SIGSTOP", **patience)
    require_one_error(
        finished,
        f"error (rank 0 of 2): timed out after {PATIENCE_S} s waiting for the other ranks: ",
    )
    require_ended_ranks(tmp_path)


def test_a_rank_that_is_killed_ends_all(engines, tmp_path):
    finished = drive(2, "signal", tmp_path, engines.make(2, "float32"), "SIGKILL")
    assert finished.status != 0 and finished.errors == []
    assert "signal 9 (Killed)" in finished.stderr
    require_ended_ranks(tmp_path)


def test_a_rank_without_memory_ends_all(engines, tmp_path):
    finished = drive(2, "memory", tmp_path, engines.make(2, "float32"))
    require_one_error(finished, "error (rank 1 of 2): CUDA: out of memory; ")


def test_ranks_without_a_gpu_of_their_own(engines, tmp_path):
    finished = drive(2, "choose", tmp_path, engines.make(2, "float32"))
    require_one_error(finished, f"error: 2 ranks on {socket.gethostname()} share 1 GPU(s), but ")
