"""Commands with `--runtime tensorrt`, on a plan that TensorRT-RTX has built and a simulation runs.

Their output must equal that of ONNX Runtime, and name TensorRT as the runtime.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpt_trt.engines.spec import BuildLimits
from mpt_trt.errors import MptTrtError
from support.engines import COMPUTE_CAPABILITIES, build, call_tool, convert
from support.paths import REPOSITORY
from support.simulated.install import Simulation, installed

MODEL = REPOSITORY / "resources" / "mpt-demo"
LIMITS = BuildLimits(max_batch_size=4, max_input_len=24, max_output_len=40)
PROMPTS = ("def read(self", "import os\n\n\nclass Path", "The")


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    return build(convert(MODEL, folder / "ft" / "1-gpu"), folder / "engine", LIMITS)


@pytest.fixture
def simulation(engine_dir) -> Iterator[Simulation]:
    with installed(COMPUTE_CAPABILITIES[0]) as made:
        made.register(engine_dir)
        yield made


@pytest.mark.parametrize("options", [(), ("--num_beams=2",), ("--top_k=5", "--random_seed=3")])
def test_run(options, engine_dir, simulation, tmp_path, capfd):
    texts = []
    for runtime in ("tensorrt", "onnxruntime"):
        call_tool(
            "run.py",
            f"--engine_dir={engine_dir}",
            f"--tokenizer_dir={MODEL}",
            f"--output_csv={tmp_path / f'{runtime}.csv'}",
            f"--runtime={runtime}",
            "--max_output_len=12",
            "--num_threads=1",
            *("--input_text", *PROMPTS[: 2 if "--num_beams=2" in options else 3]),
            *options,
        )
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] != ""
    assert (tmp_path / "tensorrt.csv").read_text() == (tmp_path / "onnxruntime.csv").read_text()


def test_smoke_test(engine_dir, simulation, tmp_path):
    call_tool(
        "smoke_test.py",
        f"--engine_dir={engine_dir}",
        f"--model_dir={MODEL}",
        f"--output={tmp_path / 'result.json'}",
        "--max_new_tokens=12",
        "--runtime=tensorrt",
        "--min_top1=1.0",
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["passed"] and result["fallback_reason"] is None
    assert result["runtime"].startswith("tensorrt_rtx 1.")


def test_quality(engine_dir, simulation, tmp_path):
    reference = tmp_path / "reference.safetensors"
    call_tool(
        "compute_reference.py",
        f"--model_dir={MODEL}",
        f"--text={MODEL / 'heldout.txt'}",
        f"--output={reference}",
        *("--num_windows=2", "--window_length=40"),
    )
    call_tool(
        "measure_quality.py",
        f"--engine_dir={engine_dir}",
        f"--model_dir={MODEL}",
        f"--reference={reference}",
        f"--output={tmp_path / 'quality.json'}",
        "--runtime=tensorrt",
    )
    result = json.loads((tmp_path / "quality.json").read_text())
    assert result["runtime"].startswith("tensorrt_rtx 1.") and result["fallback_reason"] is None
    assert abs(result["figures"]["kl"]["mean"]) < 1e-9


def test_a_plan_of_another_engine_is_refused(engine_dir, simulation, tmp_path):
    """Only the simulation knows no such plan; the message is what a user would get."""
    simulation.plans.clear()
    with pytest.raises(MptTrtError, match=r"cannot load the plan on this GPU: .*build it again"):
        call_tool(
            "run.py",
            f"--engine_dir={engine_dir}",
            f"--tokenizer_dir={MODEL}",
            "--runtime=tensorrt",
            "--max_output_len=2",
        )
