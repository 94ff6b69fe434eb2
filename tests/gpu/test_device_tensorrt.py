"""The engine of TensorRT plans on a real GPU: its buffers, copies, streams and CUDA graphs.

No plan is needed: steps are computed by ONNX Runtime's CUDA provider (support/simulated/device.py),
and compared with ONNX Runtime on the CPU.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from cuda.bindings import runtime as cudart

from engines.test_mpi import mpirun
from first_contact.checked import CheckedTensorRt
from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED
from mpt_trt.engines.build.assemble import write_manifest
from mpt_trt.engines.build.rank_network import NetworkInputs, write_networks
from mpt_trt.engines.cuda.memory import call
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.engines.onnxruntime.cpu_engine import OnnxRuntimeEngine
from mpt_trt.engines.rank_descriptions import (
    engine_name,
    network_name,
    read_network_hash,
    write_plan_description,
)
from mpt_trt.engines.spec import BuilderInfo
from mpt_trt.engines.tensorrt.engine import TensorRtEngine
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.system.files import content_hash
from support import nccl_driver
from support.checkpoints import CheckpointSpec
from support.engines import FEATURES, LIMITS, ONE_THREAD, make_ft_checkpoint
from support.nccl_driver import require_all_reduce
from support.simulated.device import PLAN_MARK, VERSION, DeviceTensorRt
from support.step_scenario import make_steps, require_same_text

pytestmark = pytest.mark.gpu

PACKAGE = "tensorrt_rtx"
BOUNDS = {"float32": 5e-4, "float16": 5e-2}
WIDE = CheckpointSpec(hidden_size=256, num_heads=4, num_kv_heads=2, num_layers=2, vocab_size=301)
UNEVEN = CheckpointSpec(hidden_size=60, num_heads=6, num_kv_heads=3, num_layers=1, vocab_size=101)
STEPS = 300


@contextmanager
def on_device(engine_dir: Path, monkeypatch):
    """A TensorRtEngine on the GPU, and the rules that it broke."""
    onnxruntime.preload_dlls()
    manifest = read_manifest(engine_dir)
    broken: list[str] = []
    module = CheckedTensorRt(DeviceTensorRt({engine_dir: manifest.spec}), broken)
    monkeypatch.setitem(sys.modules, PACKAGE, module)
    yield TensorRtEngine(engine_dir, manifest), manifest
    assert not broken


def build(spec: CheckpointSpec, dtype: str, folder: Path, limits=LIMITS, calibrate=None) -> Path:
    """An engine directory whose plan only names its network; needs no TensorRT."""
    if calibrate is None:
        checkpoint, calibrated = make_ft_checkpoint(folder, spec, dtype), NOT_QUANTIZED
    else:
        checkpoint, calibrated = calibrate(folder, spec, dtype)
    target = folder / "engine"
    target.mkdir()
    write_networks(NetworkInputs(checkpoint, limits, VocabularySharding(), calibrated), target)
    plan = target / engine_name(0)
    plan.write_bytes(PLAN_MARK + str(target / network_name(0)).encode())
    builder = BuilderInfo(PACKAGE, VERSION, ("9.0",))
    write_plan_description(plan, content_hash(plan), read_network_hash(target, 0), builder)
    write_manifest(target, [(target, target)])
    return target


def require_same(engine_dir: Path, vocab_size: int, bound: float, monkeypatch) -> None:
    differences: list[float] = []
    with on_device(engine_dir, monkeypatch) as (ours, manifest):
        theirs = OnnxRuntimeEngine(engine_dir, manifest, ONE_THREAD)
        make_steps(ours, theirs, vocab_size, lambda found, _: differences.append(found))
        if bound == BOUNDS["float32"]:
            require_same_text(ours, theirs, vocab_size)
    print(f"largest difference: {max(differences):.2g}")
    assert max(differences) <= bound, differences


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "name", ["multi-head", "grouped-query", "qk_ln", "learned positions", "everything", "rmsnorm"]
)
def test_features(name, dtype, tmp_path, monkeypatch):
    engine_dir = build(FEATURES[name], dtype, tmp_path)
    require_same(engine_dir, FEATURES[name].vocab_size, BOUNDS[dtype], monkeypatch)


def test_sizes_that_nothing_is_aligned_to(tmp_path, monkeypatch):
    limits = replace(LIMITS, max_output_len=17)
    engine_dir = build(UNEVEN, "float32", tmp_path, limits)
    require_same(engine_dir, UNEVEN.vocab_size, BOUNDS["float32"], monkeypatch)


@pytest.mark.parametrize("name", ["int8 cache", "fp8 cache"])
def test_copied_caches(name, tmp_path, monkeypatch):
    pytest.importorskip("modelopt")
    import torch

    from engines.test_quantized_engines import QUANTIZATIONS, WITH_FP8_CACHE, Model
    from support.checkpoints import write_checkpoint

    quantization = (QUANTIZATIONS | WITH_FP8_CACHE)[name]

    def calibrate(folder: Path, spec: CheckpointSpec, dtype: str) -> tuple:
        generator = torch.Generator().manual_seed(1)
        samples = torch.randint(spec.vocab_size, (2, 16), generator=generator)
        model = Model(write_checkpoint(folder / "hf", spec), folder, samples, group_size=16)
        checkpoint = model.checkpoint(quantization, 1, dtype)
        return checkpoint, model.calibrated(quantization, checkpoint)

    engine_dir = build(WIDE, "float16", tmp_path, LIMITS, calibrate)
    require_same(engine_dir, WIDE.vocab_size, 0.5, monkeypatch)


def test_memory_is_released(tmp_path, monkeypatch):
    """Loading, running and dropping an engine leaves as much free memory as before."""
    engine_dir = build(WIDE, "float16", tmp_path)
    free = []
    for _ in range(4):
        with on_device(engine_dir, monkeypatch) as (ours, _):
            ours.start(4)
            for position in range(6):
                where = np.array([[row, 0] for row in range(4)])
                ours.step(np.ones((4, 1), np.int64), np.array([position] * 4), where)
        del ours
        gc.collect()
        free.append(cudart.cudaMemGetInfo()[1])
    # The first one loads kernels, which stay.
    assert free[-1] >= free[1] - (1 << 20), free


def test_host_overhead_per_step(tmp_path, monkeypatch):
    """Measures a replayed step beyond its graph: three copies in, one out, and Python.

    Writes a JSON object to the file that MPT_TRT_OVERHEAD_RESULT names.
    """
    engine_dir = build(WIDE, "float16", tmp_path)
    results = {}
    with on_device(engine_dir, monkeypatch) as (ours, _):
        for rows in (1, 4):
            ours.start(rows)
            ids, where = np.ones((rows, 1), np.int64), np.array([[row, 0] for row in range(rows)])
            positions = np.full(rows, 5)
            step: Callable = lambda: ours.step(ids, positions, where)  # noqa: B023, E731
            for _ in range(5):
                step()
            generation = ours._generations[rows, rows]
            [graph] = generation.graphs._graphs.values()
            stream = ours._stream

            def launch() -> None:
                graph.launch()  # noqa: B023
                stream.synchronize()  # noqa: B023

            def plain() -> None:
                generation.context.enqueue(stream.handle)  # noqa: B023
                stream.synchronize()  # noqa: B023

            times = {
                name: microseconds(action)
                for name, action in (("step", step), ("graph", launch), ("plain", plain))
            }
            results[rows] = times | {"overhead": times["step"] - times["graph"]}
    print(json.dumps(results))
    if path := os.environ.get("MPT_TRT_OVERHEAD_RESULT"):
        Path(path).write_text(json.dumps(results))
    assert all(times["overhead"] < 1000 for times in results.values())


def microseconds(action: Callable[[], object]) -> float:
    """Median of several rounds."""
    rounds = []
    for _ in range(7):
        started = time.perf_counter()
        for _ in range(STEPS):
            action()
        rounds.append(1e6 * (time.perf_counter() - started) / STEPS)
    return float(np.median(rounds))


class LoneRank:
    """The only rank."""

    rank, size, patience_seconds = 0, 1, 300.0

    def exchange(self, value):
        return [value]


def test_nccl_in_a_captured_graph():
    pytest.importorskip("nccl.core")
    call(cudart.cudaSetDevice(0))
    require_all_reduce(LoneRank())


def test_nccl_of_two_gpus():
    pytest.importorskip("nccl.core")
    if call(cudart.cudaGetDeviceCount()) < 2:
        pytest.skip("needs two GPUs")
    finished = mpirun(2, Path(nccl_driver.__file__), PYTHONSAFEPATH="1")
    assert finished.status == 0, finished.stdout + finished.stderr
