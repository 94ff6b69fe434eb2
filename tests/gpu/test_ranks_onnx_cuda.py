"""Engines of several ranks under ONNX Runtime's CUDA provider, on as many GPUs.

On one GPU, each rank is tested alone: its collectives go through an NCCL communicator of one rank,
and take the other ranks' parts for its own.
"""

from __future__ import annotations

import re
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.test_mpi import BOTH, PATIENCE_S, WHOLE, Engines, Finished, mpirun
from engines.test_mpi import write_empty_plans as without_plans
from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED, CalibratedQuantization
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.engines.build.build import build_engine
from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.engines.cuda.memory import DeviceBuffer
from mpt_trt.engines.load import load_engine
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.engines.onnxruntime.cpu_engine import OnnxRuntimeEngine
from mpt_trt.engines.spec import BuilderChoice
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.model.tensors import weights
from mpt_trt.quantization.schemes import Quantization, WeightOnly
from mpt_trt.system import gpus
from support import gpu_ranks_driver, mpi_driver
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.echo_ranks import EchoRanks
from support.engines import COMPUTE_CAPABILITIES, LIMITS, ONE_THREAD
from support.identity_ranks import IdentityNccl, IdentityRanks
from support.processes import require_ended
from support.step_scenario import make_steps, require_same_text

pytestmark = pytest.mark.gpu

BOUNDS = {"float32": 5e-5, "float16": 3e-2, "bfloat16": 0.3}
WIDE = CheckpointSpec(hidden_size=256, num_heads=4, num_layers=2, vocab_size=8192)
ODD = CheckpointSpec(
    num_heads=8, num_kv_heads=2, qk_ln=True, no_bias=False, vocab_size=131, rope={"rope_theta": 9}
)
PLAIN = Quantization()
# A GPU reads a cache row from a multiple of 256 bytes on: at 2 and 4 ranks in float16, a row of
# these engines has 768 bytes per layer.
WITH_ALIGNED_ROWS = replace(LIMITS, max_output_len=48)
INT4, INT8 = Quantization(WeightOnly(4, 64)), Quantization(WeightOnly(8), head="int8")


def make_engine(
    folder: Path,
    spec: CheckpointSpec,
    size: int,
    dtype: str,
    quantization: Quantization = PLAIN,
    vocabulary: VocabularySharding | None = None,
) -> Path:
    """An engine directory without plans."""
    hf = write_checkpoint(folder / "hf", spec)
    config = read_hf_config(hf)
    settings = ConversionSettings(dtype, size, 1, "test-model", {})
    ft = folder / "ft" / f"{size}-gpu"
    write_ft_checkpoint(HfCheckpoint(hf, weights(config)), config, settings, ft)
    calibrated = NOT_QUANTIZED
    if quantization != PLAIN:
        calibrated = CalibratedQuantization(quantization)
    vocabulary = vocabulary or VocabularySharding()
    inputs = NetworkInputs(read_ft_checkpoint(ft), LIMITS, vocabulary, calibrated)
    builder = BuilderChoice("tensorrt_rtx", COMPUTE_CAPABILITIES)
    build_engine(inputs, builder, folder / "engine", without_plans)
    return folder / "engine"


# --- each rank alone, on one GPU -----------------------------------------------------------------


@pytest.fixture
def lone_nccl():
    pytest.importorskip("nccl.core")
    from mpt_trt.engines.cuda.nccl import join_nccl

    return join_nccl(EchoRanks(0, 1))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("spec", "size", "rank", "quantization", "vocabulary"),
    [
        (WIDE, 2, 0, PLAIN, None),
        (WIDE, 2, 1, INT4, None),
        (WIDE, 2, 0, INT8, BOTH),
        (ODD, 2, 1, PLAIN, BOTH),
        (ODD, 4, 2, PLAIN, WHOLE),
    ],
)
def test_a_rank_alone(spec, size, rank, quantization, vocabulary, dtype, lone_nccl, tmp_path):
    from mpt_trt.engines.onnxruntime.cuda.engine import OnnxCudaEngine

    engine_dir = make_engine(tmp_path, spec, size, dtype, quantization, vocabulary)
    manifest = read_manifest(engine_dir)
    ours = OnnxCudaEngine(engine_dir, manifest, rank)
    ours.connect(IdentityNccl(lone_nccl, size))
    theirs = OnnxRuntimeEngine(engine_dir, manifest, ONE_THREAD, IdentityRanks(rank, size))
    differences: list[float] = []
    make_steps(ours, theirs, spec.vocab_size, lambda found, _: differences.append(found))
    print(f"largest difference: {max(differences):.2g}")
    assert max(differences) <= BOUNDS[dtype], differences
    if dtype == "float32":
        require_same_text(ours, theirs, spec.vocab_size)
    # NCCL waits for the engine's graphs.
    del ours


def test_after_an_abort_nothing_is_computed(lone_nccl, tmp_path):
    from mpt_trt.engines.onnxruntime.cuda.engine import OnnxCudaEngine

    engine_dir = make_engine(tmp_path, WIDE, 2, "float16")
    engine = OnnxCudaEngine(engine_dir, read_manifest(engine_dir), 0)
    engine.connect(IdentityNccl(lone_nccl, 2))
    engine.start(1)
    arguments = (np.array([[1]]), np.array([0]), np.array([[0, 0]]))
    for _ in range(4):
        engine.step(*arguments)
    lone_nccl._watch._patience_seconds = 0.0
    with pytest.raises(MptTrtError, match="timed out after 0 s"):
        for _ in range(100_000):
            engine.step(*arguments)
    with pytest.raises(MptTrtError, match="timed out after 0 s"):
        engine.step(*arguments)
    del engine


def test_memory_that_is_not_there_is_one_sentence():
    with pytest.raises(MptTrtError, match=r"^CUDA: out of memory; free GPU memory or lower"):
        DeviceBuffer(1 << 50)


# --- ranks together ------------------------------------------------------------------------------


def require_gpus(count: int) -> None:
    if len(gpus.identifiers()) < count:
        pytest.skip(f"needs {count} GPUs; this machine has {len(gpus.identifiers())}")


def drive(size: int, *arguments: object, **environment: str) -> Finished:
    script = Path(gpu_ranks_driver.__file__)
    return mpirun(
        size, script, *arguments, python=sys.executable, PYTHONSAFEPATH="1", **environment
    )


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"), WITH_ALIGNED_ROWS)


KINDS = [("float32", BOTH), ("float32", WHOLE), ("float16", BOTH), ("bfloat16", WHOLE)]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_what_one_rank_does(size, engines, tmp_path):
    require_gpus(size)
    for dtype, bound in BOUNDS.items():
        paths = [
            engines.make(size, name, vocabulary) for name, vocabulary in KINDS if name == dtype
        ]
        finished = drive(size, "compare", tmp_path, bound, *paths)
        assert finished.status == 0, finished.stdout + finished.stderr
        print(finished.stdout)
        alone = mpi_driver.record(load_engine(engines.make(1, dtype), "onnxruntime"))
        for path in paths:
            first, *others = (
                np.load(tmp_path / f"{path.name}.rank{rank}.npz") for rank in range(size)
            )
            for other in others:
                assert all(np.array_equal(first[name], other[name]) for name in first), path
            if dtype == "float32":
                for name in ("greedy", "beams", "long", "batched"):
                    assert np.array_equal(first[name], alone[name]), (path, name)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("quantization", [PLAIN, INT4, INT8], ids=["none", "int4", "int8"])
def test_quantized_ranks(quantization, size, tmp_path):
    require_gpus(size)
    engine = make_engine(tmp_path, WIDE, size, "float16", quantization)
    finished = drive(size, "compare", tmp_path, BOUNDS["float16"], engine)
    assert finished.status == 0, finished.stdout + finished.stderr
    print(finished.stdout)


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
def test_a_rank_that_hangs_or_dies_ends_all(name, engines, tmp_path):
    require_gpus(2)
    patience = {"MPT_TRT_PATIENCE_SECONDS": str(PATIENCE_S)}
    engine = engines.make(2, "float32")
    finished = drive(2, "signal", tmp_path, engine, name, **patience)
    assert finished.status != 0 and "generated to the end" not in finished.stdout
    assert finished.seconds < 60
    if name == "SIGSTOP":
        [error] = finished.errors
        assert error.startswith(f"error (rank 0 of 2): timed out after {PATIENCE_S} s waiting")
    require_ended([int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)], within_s=5)


def test_ranks_with_the_same_gpu(engines, tmp_path):
    require_gpus(2)
    finished = drive(2, "share", tmp_path, engines.make(2, "float32"))
    [error] = finished.errors
    assert error.startswith("error: ranks 0 and 1 have the same GPU of ")


def test_fewer_gpus_than_ranks(engines, tmp_path):
    first = {"CUDA_VISIBLE_DEVICES": gpus.identifiers()[0]}
    finished = drive(2, "compare", tmp_path, 0, engines.make(2, "float32"), **first)
    [error] = finished.errors
    host = re.escape(socket.gethostname())
    assert re.match(f"error: 2 ranks on {host} share 1 GPU", error)
