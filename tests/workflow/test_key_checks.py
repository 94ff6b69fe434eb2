"""Values that a model or a builder cannot have are refused before any job runs, by their keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt_trt.engines.tensorrt.packages import installed_package
from mpt_trt.errors import MptTrtError
from mpt_trt.workflow.job_checks import require_possible
from mpt_trt.workflow.plan import Plan, Target
from mpt_trt.workflow.settings import parse_settings
from support.checkpoints import CheckpointSpec, write_checkpoint

SPEC = CheckpointSpec(num_layers=1, max_seq_len=64, alibi=False)
FP8 = {"method": "fp8"}
LIMITS = {"max_input_len": 24, "max_output_len": 16, "backend": "tensorrt_rtx"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, with learned positions for 64 tokens, and `bare`, the same without a tokenizer."""
    made = tmp_path_factory.mktemp("keys")
    for name in ("model", "bare"):
        write_checkpoint(made / name, SPEC)
    for path in (made / "bare").glob("tokenizer*"):
        path.unlink()
    (made / "text.txt").write_text("what is read")
    return made


def make_plan(folder: Path, variant: dict, model: dict, **content: dict) -> Plan:
    settings = {
        "site": {"gpus": "none"},
        "models": {"m": {"source": "./model"} | model},
        "variants": {"v": LIMITS | variant},
        "quality": {"text": "text.txt", "window_length": 40},
        "calibration": {"sequence_length": 64},
    }
    return Plan(parse_settings(settings | content), Path("/nowhere"), folder)


TARGET = Target("m", "v", storage="sq", qformat="fp8")
CASES = {
    "unknown GPU": (
        {"variant": {"compute_capabilities": ["8.6", "9.0"]}},
        "build_rank",
        r"^variants\.v\.compute_capabilities = 9\.0: tensorrt_rtx .* builds for 7\.5, 8\.0, 8\.6",
    ),
    "GPU without fp8": (
        {"variant": {"quantization": FP8, "compute_capabilities": ["8.6", "8.9"]}},
        "build_rank",
        r"^variants\.v\.compute_capabilities: 8\.6 cannot compute with fp8",
    ),
    "GPU without an fp8 cache": (
        {"variant": {"kv_cache_dtype": "fp8", "compute_capabilities": ["8.0"]}},
        "build_rank",
        r"^variants\.v\.compute_capabilities: 8\.0 cannot compute with fp8",
    ),
    "no tokenizer": (
        {"model": {"source": "./bare"}},
        "smoke_test",
        r"bare: no tokenizer there .*; set models\.m\.tokenizer to a folder or a hub id",
    ),
    "tokenizer without files": (
        {"model": {"tokenizer": "./bare"}},
        "quantize",
        r"bare: no tokenizer there .*; correct models\.m\.tokenizer",
    ),
    "tokenizer nowhere": (
        {"model": {"tokenizer": "./nowhere"}},
        "compute_reference",
        r"^models\.m\.tokenizer = \./nowhere: no such folder, and not a hub id",
    ),
    "cache": (
        {"variant": {"max_output_len": 41}},
        "make_networks",
        r"^variants\.v\.max_input_len \+ max_output_len = 65, but the model has positions for 64",
    ),
    "bits": (
        {"variant": {"quantization": {"method": "mixed", "bits": 4.9}}},
        "make_networks",
        r"^variants\.v\.quantization\.bits = 4\.9: this model's .* take 5 bits .* set bits to 5 or",
    ),
    "window": (
        {"quality": {"text": "text.txt", "window_length": 65}},
        "compute_reference",
        r"^quality\.window_length = 65, but the model has positions for 64 tokens",
    ),
    "calibration": (
        {"calibration": {"sequence_length": 65}},
        "convert_smoothquant_checkpoint",
        r"^calibration\.sequence_length = 65, but the model has positions for 64 tokens",
    ),
    "held-out text": (
        {"quality": {"text": "txt.txt"}},
        "compute_reference",
        r"^quality\.text = txt\.txt: no such file",
    ),
    "calibration text": (
        {"calibration": {"text": "./model"}},
        "quantize",
        r"^calibration\.text = \./model: not a file",
    ),
    "new tokens": (
        {"smoke_test": {"max_new_tokens": 40}},
        "smoke_test",
        r"^smoke_test\.max_new_tokens = 40, but a row of the engine's cache holds 40 tokens",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_impossible_values_are_refused_by_their_keys(case: str, folder: Path) -> None:
    changes, step, message = CASES[case]
    plan = make_plan(folder, **{"variant": {}, "model": {}} | changes)
    with pytest.raises(MptTrtError, match=message):
        require_possible(plan, step, TARGET)


@pytest.mark.parametrize(
    ("changes", "model"),
    [
        ({}, {}),
        ({"quantization": FP8}, {}),
        ({"quantization": {"method": "mixed", "bits": 5}}, {}),
        ({"compute_capabilities": ["7.5", "12.1"]}, {}),
        ({}, {"tokenizer": "./model", "source": "./bare"}),
        ({}, {"tokenizer": "owner/name", "source": "./bare"}),
        # Not fetched yet: the steps look again.
        ({"max_output_len": 400}, {"source": "owner/name"}),
        ({"quantization": {"method": "mixed", "bits": 4.9}}, {"source": "owner/name"}),
    ],
)
def test_possible_values_are_not(changes: dict, model: dict, folder: Path) -> None:
    plan = make_plan(folder, changes, model)
    for step in (case[1] for case in CASES.values()):
        require_possible(plan, step, TARGET)


def test_data_centre_builders_know_their_gpu_themselves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mpt_trt.engines.tensorrt.packages.installed_package",
        lambda module: (
            installed_package("tensorrt_rtx")
            and type(installed_package("tensorrt_rtx"))(module, "11.0")
        ),
    )
    plan = make_plan(folder, {"backend": "tensorrt", "compute_capabilities": ["9.0"]}, {})
    require_possible(plan, "build_rank", TARGET)
