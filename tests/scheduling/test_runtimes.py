"""Continuous batching on every runtime: tokens are those that each request gets alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.test_quantized_engines import QUANTIZATIONS, WITH_FP8_CACHE, Model
from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED
from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.engines.cuda.memory import PinnedLogits
from mpt_trt.engines.interface import RowModel
from mpt_trt.engines.load import load_engine
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.engines.onnxruntime.cuda.engine import OnnxCudaEngine
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.errors import MptTrtError
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import Quantization
from mpt_trt.scheduling.scheduler import Request, Scheduler
from support.batching import batched
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.simulated.install import build_simulated, installed, installed_onnxruntime_gpu

CACHES = QUANTIZATIONS | WITH_FP8_CACHE | {"auto cache": Quantization()}
SPEC = CheckpointSpec(hidden_size=64, num_heads=4, num_kv_heads=2, num_layers=2, vocab_size=67)
LIMITS = BuildLimits(max_batch_size=3, max_input_len=8, max_output_len=24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    samples = torch.randint(67, (2, 16), generator=torch.Generator().manual_seed(1))
    return Model(write_checkpoint(folder / "hf", SPEC), folder, samples, group_size=16)


def make_engine(model: Model, name: str, folder: Path, limits: BuildLimits = LIMITS) -> Path:
    quantization = CACHES[name]
    checkpoint = model.checkpoint(quantization, 1, "float32")
    calibrated = NOT_QUANTIZED
    if name != "auto cache":
        calibrated = model.calibrated(quantization, checkpoint)
    inputs = NetworkInputs(checkpoint, limits, VocabularySharding(), calibrated)
    return build_simulated(inputs, folder / "engine")


def require_same_tokens(model: RowModel, top_ks: list[int], seed: int = 0) -> None:
    """Random requests, some with prompts in several pieces, one or three steps after another.

    top_ks: those of the requests, in turn.
    """
    numbers = np.random.default_rng(seed)
    prompts = [numbers.integers(0, 67, numbers.integers(1, 20)).tolist() for _ in range(8)]
    config = GenerationConfig(12, end_ids=(7,), pad_id=0, random_seed=seed)
    configs = [
        replace(config, max_new_tokens=int(numbers.integers(1, 12)), top_k=top_k)
        for top_k in (top_ks * len(prompts))[: len(prompts)]
    ]
    expected = [
        generate(model, [prompt], one)[0][0].tokens
        for prompt, one in zip(prompts, configs, strict=True)
    ]
    for steps_between in (0, 1, 3):
        assert batched(model, prompts, configs, steps_between) == expected


@pytest.mark.parametrize("name", ["auto cache", "int8 cache", "fp8 cache"])
@pytest.mark.parametrize("top_ks", [[1], [0, 1, 1]], ids=["most likely", "also others"])
def test_tensorrt_and_onnx_runtime(
    top_ks: list[int], name: str, model: Model, tmp_path: Path
) -> None:
    folder = make_engine(model, name, tmp_path)
    require_same_tokens(load_engine(folder, "onnxruntime", num_threads=1).model, top_ks)
    with installed() as simulation, installed_onnxruntime_gpu(simulation):
        engine = load_engine(folder, "tensorrt")
        require_same_tokens(engine.model, top_ks)
        del engine
        cuda_engine = OnnxCudaEngine(folder, read_manifest(folder))
        require_same_tokens(cuda_engine, top_ks)
        del cuda_engine


@pytest.mark.parametrize("runtime", ["tensorrt", "onnxruntime"])
def test_gpus_choose_most_likely_tokens_while_texts_are_made(
    runtime: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No logits are copied after the prompts, and every step leaves time to deliver tokens."""
    folder = make_engine(model, "auto cache", tmp_path)
    with installed() as simulation, installed_onnxruntime_gpu(simulation):
        if runtime == "tensorrt":
            engine = load_engine(folder, runtime).model
        else:
            engine = OnnxCudaEngine(folder, read_manifest(folder))
        monkeypatch.setattr(PinnedLogits, "fetch", None)
        made, delivered = [], []
        scheduler = Scheduler(engine, deliver=lambda: delivered.append(len(made)))
        for prompt in ((5, 6), (3, 4)):
            config = GenerationConfig(6, end_ids=(), pad_id=0)
            scheduler.add(Request(prompt, config, made.append, lambda error: None))
        while not scheduler.is_idle:
            scheduler.run_once()
        assert len(made) == 12
        assert delivered == [0, 2, 4, 6, 8, 10]
        del engine, scheduler


def test_rows_that_no_gpu_can_start_at(model: Model, tmp_path: Path) -> None:
    folder = make_engine(model, "auto cache", tmp_path, replace(LIMITS, max_output_len=23))
    with installed():
        engine = load_engine(folder, "tensorrt").model
        with pytest.raises(MptTrtError, match="multiple of 256: requests cannot join"):
            Scheduler(engine)
        del engine
