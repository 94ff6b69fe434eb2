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
from mpt_trt.engines.interface import RowModel
from mpt_trt.engines.load import load_engine
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.errors import MptTrtError
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import Quantization
from mpt_trt.scheduling.scheduler import Scheduler
from support.batching import batched
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.simulated.install import build_simulated, installed

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


def require_same_tokens(model: RowModel, seed: int = 0) -> None:
    """Random requests, some with prompts in several pieces, one or three steps after another."""
    numbers = np.random.default_rng(seed)
    prompts = [numbers.integers(0, 67, numbers.integers(1, 20)).tolist() for _ in range(8)]
    config = GenerationConfig(12, end_ids=(7,), pad_id=0)
    configs = [replace(config, max_new_tokens=int(numbers.integers(1, 12))) for _ in prompts]
    expected = [
        generate(model, [prompt], one)[0][0].tokens
        for prompt, one in zip(prompts, configs, strict=True)
    ]
    for steps_between in (0, 1, 3):
        assert batched(model, prompts, configs, steps_between) == expected


@pytest.mark.parametrize("name", ["auto cache", "int8 cache", "fp8 cache"])
def test_tensorrt_and_onnx_runtime(name: str, model: Model, tmp_path: Path) -> None:
    folder = make_engine(model, name, tmp_path)
    require_same_tokens(load_engine(folder, "onnxruntime", num_threads=1).model)
    with installed():
        engine = load_engine(folder, "tensorrt")
        require_same_tokens(engine.model)
        del engine


def test_rows_that_no_gpu_can_start_at(model: Model, tmp_path: Path) -> None:
    folder = make_engine(model, "auto cache", tmp_path, replace(LIMITS, max_output_len=23))
    with installed():
        engine = load_engine(folder, "tensorrt").model
        with pytest.raises(MptTrtError, match="multiple of 256: requests cannot join"):
            Scheduler(engine)
        del engine
