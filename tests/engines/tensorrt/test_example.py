"""The minimal example of docs/engine_format.md, on the simulated TensorRT and CUDA."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.tensorrt.test_simulated_engine import TINY, simulated, tiny
from engines.test_quantized_engines import QUANTIZATIONS, WITH_FP8_CACHE
from mpt_trt.engines.load import load_engine
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.quantization.schemes import Quantization
from support.engines import LIMITS
from support.paths import REPOSITORY
from support.simulated.install import installed

__all__ = ["tiny"]

EXAMPLE = REPOSITORY / "docs" / "examples" / "run_plan.py"
CACHES = {
    "in place": Quantization(),
    "int8": QUANTIZATIONS["int8 cache"],
    "fp8": WITH_FP8_CACHE["fp8 cache"],
}
COUNT = 6


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("length", [3, 1, LIMITS.max_input_len + 2])
def test_the_example_generates_what_an_engine_does(
    cache, length, tiny, tmp_path, monkeypatch, capsys
):
    quantization = CACHES[cache]
    checkpoint = tiny.checkpoint(quantization, 1)
    calibrated = tiny.calibrated(quantization, checkpoint)
    folder = simulated(checkpoint, tmp_path / "engine", LIMITS, calibrated)
    prompt = np.random.default_rng(0).integers(0, TINY.vocab_size, length).tolist()
    spec = importlib.util.spec_from_file_location("run_plan", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, (folder, COUNT, *prompt))])
    with installed(users_of_cuda=(example,)) as simulation:
        # It ends with its process, and releases nothing before.
        simulation.is_clean_at_end = False
        example.main()
        assert not simulation.book.violations
    printed = [int(word) for word in capsys.readouterr().out.split()]
    engine = load_engine(folder, "onnxruntime", num_threads=1)
    config = GenerationConfig(COUNT, end_ids=(), pad_id=0)
    assert printed == [*generate(engine.model, [prompt], config)[0][0].tokens]


def test_the_example_needs_only_tensorrt_and_cuda():
    lines = Path(EXAMPLE).read_text().splitlines()
    imported = {
        line.split()[1].split(".")[0] for line in lines if line.startswith(("import", "from"))
    }
    assert imported - sys.stdlib_module_names == {"cuda"}
    assert len(lines) <= 140
