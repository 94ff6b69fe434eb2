"""Options of each job's command, from the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt_trt.workflow.job_options import JobOptions
from mpt_trt.workflow.plan import Plan, Target
from mpt_trt.workflow.settings import parse_settings

LIMITS = {"max_batch_size": 4, "max_input_len": 24, "max_output_len": 16}
TOY = Target("toy", "v")


def options_of(variant: dict | None = None, **content: dict) -> JobOptions:
    """Makes options for a model on the hub and a variant v."""
    content["models"] = {"toy": {"source": "owner/toy", **content.pop("model", {})}}
    content["variants"] = {"v": LIMITS | (variant or {})}
    settings = parse_settings({"site": {"gpus": "none"}} | content)
    return JobOptions(Plan(settings, Path("/nowhere")))


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({}, ["--quantization=none"]),
        ({"method": "int8_weight_only"}, ["--quantization=int8_weight_only"]),
        ({"method": "int4_weight_only"}, ["--quantization=int4_weight_only"]),
        (
            {"method": "int4_weight_only", "group_size": 32},
            ["--quantization=int4_weight_only", "--group_size=32"],
        ),
        ({"method": "int4_awq", "group_size": 64}, ["--quantization=int4_awq"]),
        ({"method": "mixed", "bits": 4.5}, ["--quantization=mixed", "--bits=4.5"]),
        ({"head": "int8"}, ["--quantization=none", "--head=int8"]),
        (
            {"method": "smoothquant", "alpha": 0.8, "per_token": False},
            ["--quantization=smoothquant", "--alpha=0.8", "--per_channel", "--no-per_token"],
        ),
    ],
)
def test_quantization_of_networks(quantization: dict, expected: list[str]) -> None:
    options = options_of({"quantization": quantization})
    for found in (options.networks(TOY), options.trtllm_checkpoint(TOY)):
        others = ("--max_", "--no-shard", "--shard", "--kv_cache", "--calibration")
        assert [option for option in found if not option.startswith(others)] == expected
        assert "--kv_cache_dtype=auto" in found


def test_limits_and_vocabulary_of_networks() -> None:
    limits = ["--max_batch_size=4", "--max_input_len=24", "--max_output_len=16"]
    assert options_of().limits(TOY) == limits
    entry = {"gather_all_token_logits": True, "shard_embedding": True, "shard_head": False}
    changed = options_of(entry)
    assert changed.limits(TOY) == [*limits, "--gather_all_token_logits"]
    vocabulary = ["--shard_embedding", "--no-shard_head"]
    assert changed.networks(TOY)[3:6] == ["--gather_all_token_logits", *vocabulary]
    assert changed.trtllm_checkpoint(TOY)[:2] == vocabulary


def test_networks_name_their_calibration_result() -> None:
    path = "quantized/toy/{}/mpt_tp1_rank0.npz"
    awq = options_of({"quantization": {"method": "int4_awq"}})
    for found in (awq.networks(TOY), awq.trtllm_checkpoint(TOY)):
        assert found[-1] == f"--calibration={path.format('int4_awq')}"
    static = options_of({"quantization": {"method": "smoothquant", "per_token": False}})
    assert static.trtllm_checkpoint(TOY)[-1] == f"--calibration={path.format('int8_sq')}"
    assert not any(option.startswith("--calibration") for option in static.networks(TOY))


def test_the_builder_and_its_version() -> None:
    options = options_of({"backend": "tensorrt_rtx", "compute_capabilities": ["8.6", "9.0"]})
    package = options.plan.builder(TOY)
    assert options.builder(TOY) == {
        "options": ["--backend=tensorrt_rtx", "--compute_capabilities", "8.6", "9.0"],
        "version": package.version,
    }


@pytest.mark.parametrize(
    ("qformat", "first"),
    [
        ("fp8", ["--qformat=fp8"]),
        ("int4_awq", ["--qformat=int4_awq"]),
        ("int4_awq-g64", ["--qformat=int4_awq", "--awq_block_size=64"]),
        ("mixed-b4.5", ["--qformat=mixed", "--bits=4.5"]),
    ],
)
def test_calibration(qformat: str, first: list[str]) -> None:
    target, numbers = Target("toy", qformat=qformat), {"num_samples": 4, "sequence_length": 32}
    rest = ["--calib_size=4", "--calib_max_seq_length=32", "--device=auto"]
    assert options_of(calibration=numbers).quantize(target) == [*first, *rest]
    own = options_of(calibration=numbers | {"text": "own.txt"}, model={"tokenizer": "a/b"})
    assert own.quantize(target) == [*first, "--tokenizer_dir=a/b", "--calib_text=own.txt", *rest]


def test_conversion() -> None:
    options, target = options_of(model={"tokenizer": "a/b"}), Target("toy", storage="sq-0.8-bf16")
    plain = ["--storage_type=bfloat16", "--tokenizer_dir=a/b"]
    assert options.conversion(target) == plain
    assert options.smoothquant(target)[:3] == [*plain, "--smoothquant=0.8"]
    assert options.smoothquant(target)[3:] == options.quantize(Target("toy", qformat="fp8"))[2:]


def test_the_text_that_ships_has_a_version() -> None:
    assert options_of().shipped_text_version(TOY).startswith("xxh3:")
    assert options_of(calibration={"text": "own.txt"}).shipped_text_version(TOY) is None


def test_measurements() -> None:
    options = options_of(
        {"tolerance": {"error_factor": 2.5}},
        smoke_test={"prompt": "it's", "max_new_tokens": 3},
        quality={"num_windows": 2, "window_length": 8},
    )
    tolerance = ["--error_factor=2.5", "--min_top1=0.95"]
    assert options.comparison(TOY) == tolerance
    assert options.smoke_test(TOY) == [*tolerance, "--prompt=it's", "--max_new_tokens=3"]
    assert options.reference(TOY) == ["--num_windows=2", "--window_length=8"]
