"""Checks of jobs: impossible ones are refused before any job runs."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mpt_trt.errors import MptTrtError
from mpt_trt.workflow.job_checks import CHECKS, require_possible
from mpt_trt.workflow.plan import Plan, Target
from support.checkpoints import write_checkpoint
from support.paths import REPOSITORY
from support.plans import SPEC, TOY, make_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the toy model."""
    made = tmp_path_factory.mktemp("checks")
    write_checkpoint(made / "model", SPEC)
    return made


REFUSED = {
    "ranks": (
        "convert_checkpoint",
        Target("toy", tp=5, storage="fp16"),
        r"size 5 does not divide .* 1, 2, 3, 6",
    ),
    "storage": ("convert_checkpoint", Target("toy", storage="fp8"), "'fp8': no such storage type"),
    "alpha": ("convert_smoothquant_checkpoint", Target("toy", storage="sq-2"), "no such storage"),
    "format": ("quantize", Target("toy", qformat="int5"), "calibration 'int5': no such format"),
    "groups": ("make_networks", Target("toy", "groups", tp=2), "group_size = 128: .* are none"),
    "default groups": ("make_networks", Target("toy", "awq", tp=2), "group_size = 16: .* are none"),
    "calibrated groups": (
        "quantize",
        Target("toy", qformat="int4_gptq-g64"),
        "group_size = 64: .* are 16$",
    ),
    "rank": ("build_rank", Target("toy", "fp16", tp=2, rank=2), r"the last one is rank1\.engine"),
    "trtllm": ("convert_to_trtllm", Target("toy", "odd", tp=2), "shard_head = False: backend"),
    "window": ("measure_quality", Target("toy", "fp16"), "window_length = 512, .* 40 tokens"),
    "llm": (
        "measure_quality",
        Target("toy", "llm"),
        "quality of llm: backend tensorrt_llm has only",
    ),
    "llm speed": ("measure_throughput", Target("toy", "llm"), "throughput of llm: backend"),
    "head": ("build_trtllm_engine", Target("toy", "llm"), r"head size = \d+ \(d_model / n_heads\)"),
    "model": ("make_networks", Target("toi", "fp16"), "no model named 'toi'; did you mean 'toy'?"),
    "variant": ("make_networks", Target("toy", "fp61"), "did you mean 'fp16'?"),
}
FURTHER = {
    "groups": {"quantization": {"method": "int4_weight_only", "group_size": 128}},
    "awq": {"quantization": {"method": "int4_awq"}},
    "odd": {"shard_head": False},
    "llm": {"backend": "tensorrt_llm"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_jobs_are_refused(case: str, folder: Path) -> None:
    step, target, message = REFUSED[case]
    with pytest.raises(MptTrtError, match=message):
        require_possible(make_plan(folder, variants=FURTHER), step, target)


@pytest.mark.parametrize("case", ["ranks", "groups", "default groups", "trtllm"])
def test_what_the_architecture_forbids_waits_until_the_model_is_fetched(
    case: str, folder: Path
) -> None:
    step, target, _ = REFUSED[case]
    unfetched = Target("other", target.variant, target.tp, storage=target.storage)
    require_possible(make_plan(folder, variants=FURTHER), step, unfetched)


@pytest.mark.parametrize(
    ("step", "target"),
    [
        ("convert_checkpoint", Target("toy", tp=2, storage="fp16")),
        ("convert_smoothquant_checkpoint", Target("toy", tp=3, storage="sq-0.7")),
        ("quantize", Target("toy", qformat="int4_awq")),
        ("quantize", Target("toy", qformat="int4_awq-g16")),
        ("make_networks", Target("toy", "fp16", tp=3)),
        ("build_rank", Target("toy", "fp16", tp=2, rank=1)),
        ("convert_to_trtllm", Target("toy", "fp16", tp=1)),
    ],
)
def test_possible_jobs_are_not(step: str, target: Target, folder: Path) -> None:
    require_possible(make_plan(folder), step, target)


def test_tensorrt_llm_must_be_there_unless_nothing_is_to_be_done(tmp_path: Path) -> None:
    steps = {
        "build_trtllm_engine": "trt_engines/toy/fp16/1-gpu",
        "run_trtllm": "build/smoke_tests/toy/fp16/1-gpu.json",
    }
    plan = make_plan(tmp_path)
    elsewhere = Plan(plan.settings, plan.repository, tmp_path, deploys_software=True)
    for step, result in steps.items():
        require_possible(elsewhere, step, TOY)
        with pytest.raises(MptTrtError, match="TensorRT-LLM is not installed"):
            require_possible(plan, step, TOY)
        (tmp_path / result).mkdir(parents=True)
        require_possible(plan, step, TOY)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_tasks_need_lm_eval_unless_they_are_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(folder, quality={"tasks": ["wikitext"], "window_length": 40})
    with pytest.raises(
        MptTrtError, match=r"^quality\.tasks: lm_eval is not .*: pip install lm_eval, or remove"
    ):
        require_possible(plan, "measure_quality", TOY)
    require_possible(replace(plan, deploys_software=True), "measure_quality", TOY)
    (folder / "quality/toy/fp16").mkdir(parents=True)
    (folder / "quality/toy/fp16/1-gpu.json").touch()
    require_possible(plan, "measure_quality", TOY)
    (folder / "quality/toy/fp16/1-gpu.json").unlink()
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    require_possible(plan, "measure_quality", TOY)


def test_every_rule_that_is_checked_has_its_check() -> None:
    rules = "".join(path.read_text() for path in sorted(REPOSITORY.glob("rules/*.smk")))
    assert set(re.findall(r'require_possible\("(\w+)"\)', rules)) == set(CHECKS)
