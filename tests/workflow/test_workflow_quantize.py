"""Calibration in the workflow: its dependencies and its names."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mpt_trt.checkpoint.known_models import known_config
from mpt_trt.engines.memory import GB
from mpt_trt.quantization.schemes import QuantizationFormat
from mpt_trt.workflow.resources import calibration_memory, calibration_minutes
from support.workflow import Workflow

RESULT = "quantized/toy/{}/mpt_tp1_rank0.npz"
RANGES = RESULT.format("kv_cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """A workflow with the calibration result that is made fastest; tests leave it complete."""
    workflow = Workflow.create(tmp_path_factory.mktemp("quantize") / "project")
    assert workflow.make(RANGES) == ["quantize kv_cache"]
    return workflow


def test_nothing_is_done_twice(made: Workflow) -> None:
    assert made.planned(RANGES) == []


def test_an_edited_text_calibrates_again(made: Workflow) -> None:
    text = made.folder / "calibration.txt"
    content = text.read_text()
    before = (made.folder / RANGES).read_bytes()
    time.sleep(1.1)  # mtimes of the outputs are compared with the input's
    text.write_text(content.upper() + content)
    assert made.make(RANGES) == ["quantize kv_cache"]
    assert (made.folder / RANGES).read_bytes() != before
    text.write_text(content)
    assert made.make(RANGES) == ["quantize kv_cache"]
    assert (made.folder / RANGES).read_bytes() == before


def test_the_group_size_is_in_the_path(made: Workflow) -> None:
    planned = made.planned(*(RESULT.format(name) for name in ("int4_awq", "int4_awq-g16")))
    assert sorted(planned) == ["quantize int4_awq", "quantize int4_awq-g16"]


def test_changed_settings_calibrate_again(made: Workflow) -> None:
    config = made.folder / "config.yaml"
    content = config.read_text()
    config.write_text(content.replace("num_samples: 4", "num_samples: 3"))
    try:
        assert made.planned(RANGES) == ["quantize kv_cache"]
    finally:
        config.write_text(content)


def test_an_edited_module_calibrates_again(made: Workflow) -> None:
    path = made.folder / "mpt_trt/model/torch_block.py"
    original = path.read_text()
    made.edit_module("model/torch_block.py")
    try:
        assert made.planned(RANGES) == ["quantize kv_cache"]
    finally:
        path.write_text(original)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "int5_awq",
            "calibration 'int5_awq': no such format; known are int4_awq, int4_gptq, fp8, int8_sq",
        ),
        ("int4_awq-g100", "known are .* int4_awq-g128, int4_awq-g64"),
    ],
)
def test_misspelt_formats_get_a_hint(name: str, message: str, made: Workflow) -> None:
    result = made.run("--dry-run", RESULT.format(name))
    assert result.returncode != 0
    assert re.search(message, result.stdout + result.stderr)


@pytest.mark.parametrize(
    ("quantization_format", "least", "most"),
    [("int4_awq", 2 * GB, 6 * GB), ("int4_gptq", 10 * GB, 20 * GB)],
)
def test_memory_does_not_grow_with_the_number_of_blocks(
    quantization_format: QuantizationFormat, least: int, most: int
) -> None:
    config = known_config("mpt-7b")
    needed = calibration_memory(config, quantization_format, 32, 512)
    assert needed == calibration_memory(replace(config, num_layers=1), quantization_format, 32, 512)
    # All of its weights in float32 are 26.6 GB.
    assert least < needed < most
    assert calibration_memory(config, quantization_format, 64, 512) > needed


def test_mixed_needs_memory_and_time_for_each_block() -> None:
    config = known_config("mpt-7b")
    gptq = calibration_memory(config, "int4_gptq", 32, 512)
    # Hidden states of 32 blocks x 4 matrices x 5 formats, for an eighth of the tokens, in float32.
    states = 32 * 4 * 5 * (32 * 512 // 8) * 4096 * 4
    assert calibration_memory(config, "mixed", 32, 512) == gptq + states
    minutes = [calibration_minutes(config, each, 32 * 512, True) for each in ("fp8", "int4_gptq")]
    assert minutes[0] < minutes[1] < calibration_minutes(config, "mixed", 32 * 512, True)


def test_a_missing_text_is_named(made: Workflow, tmp_path: Path) -> None:
    config = made.folder / "config.yaml"
    content = config.read_text()
    config.write_text(content.replace("calibration.txt", "nowhere.txt"))
    try:
        result = made.run("--dry-run", RESULT.format("fp8"))
    finally:
        config.write_text(content)
    assert result.returncode != 0
    assert "nowhere.txt" in result.stdout + result.stderr
