"""Inputs of proofs: files of facts, and the engines that they are about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpt_trt.errors import MptTrtError
from mpt_trt.workflow.job_checks import require_possible
from mpt_trt.workflow.job_options import JobOptions
from mpt_trt.workflow.plan import Plan, Target
from mpt_trt.workflow.proof_inputs import ProofInputs
from mpt_trt.workflow.settings import parse_settings
from support.paths import REPOSITORY

VARIANTS = {
    "trtllm": {"backend": "tensorrt_llm"},
    "cached": {"kv_cache_dtype": "int8"},
    "fp16": {},
    "again": {},
    "bf16": {"dtype": "bfloat16"},
    "awq": {"quantization": {"method": "int4_awq"}},
}
MODELS = {
    "seven": {"source": "mosaicml/mpt-7b"},
    "instruct": {"source": "mosaicml/mpt-7b-instruct"},
    "code": {"source": "replit/replit-code-v1_5-3b"},
    "tuned": {"source": "mosaicml/mpt-7b", "adapter": "lora"},
    "own": {"source": "somebody/something", "facts": ["own.json"]},
}


def plan_of(folder: Path = Path(), **content: object) -> Plan:
    given = {"models": MODELS, "variants": VARIANTS, "site": {"gpus": "none"}} | content
    return Plan(parse_settings(given), REPOSITORY, folder)


def proofs_of(folder: Path = Path(), **content: object) -> ProofInputs:
    return ProofInputs(plan_of(folder, **content))


def test_facts_that_ship_are_about_the_source_without_an_adapter(tmp_path: Path) -> None:
    proofs = proofs_of(tmp_path)
    folder = REPOSITORY / "mpt_trt/proofs/facts"
    assert proofs.facts(Target("seven")) == [str(folder / "mpt-7b.json")]
    assert proofs.facts(Target("code")) == [str(folder / "replit-code-v1_5-3b.json")]
    with pytest.raises(MptTrtError, match=r"no published facts about .*; name .* models\.tuned\.f"):
        proofs.facts(Target("tuned"))


def test_facts_of_a_user_are_inputs(tmp_path: Path) -> None:
    proofs = proofs_of(tmp_path)
    with pytest.raises(MptTrtError, match=r"models\.own\.facts = own\.json: no such file"):
        proofs.facts(Target("own"))
    (tmp_path / "own.json").write_text(json.dumps({"facts": []}))
    assert proofs.facts(Target("own")) == ["own.json"]
    assert proofs.measurements(Target("own")) == []


def test_files_that_facts_name_are_inputs(tmp_path: Path) -> None:
    common = {
        "kind": "score", "source": "me", "engine": {"dtype": "float16"}, "value": 1,
        "tolerance": 0, "reason": "-",
    }  # fmt: skip
    text = common | {"name": "a", "text": "text.txt", "metric": "bits_per_byte"}
    task = common | {"name": "b", "task": "t", "task_dir": "tasks", "metric": "acc"}
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"facts": [text, task]}))
    proofs = proofs_of(tmp_path)
    assert proofs.named_files(Target("own")) == []
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/t.yaml").touch()
    (tmp_path / "text.txt").touch()
    assert proofs.named_files(Target("own")) == ["text.txt", "tasks/t.yaml"]
    own.write_text(json.dumps({"facts": [task | {"task_dir": "."}]}))
    with pytest.raises(
        MptTrtError, match=r"own\.json: task_dir .* contains the workflow's outputs"
    ):
        proofs.named_files(Target("own"))


def test_engines_are_the_first_of_each_kind() -> None:
    proofs = proofs_of()
    assert proofs.engines(Target("seven")) == [("fp16", 2), ("fp16", 1)]
    assert proofs.engines(Target("instruct")) == [("fp16", 1), ("awq", 1)]
    assert proofs.measurements(Target("code")) == ["build/proofs/code/bf16/2-gpu.json"]


def test_the_configuration_chooses_engines() -> None:
    one = proofs_of(proofs={"tp_size": 1})
    assert one.engines(Target("seven")) == [("fp16", 1)]
    again = proofs_of(proofs={"variants": ["again"]})
    assert again.engines(Target("seven")) == [("again", 2), ("again", 1)]
    assert again.engines(Target("code")) == []
    with pytest.raises(MptTrtError, match="no variant named 'fp17'"):
        proofs_of(proofs={"variants": ["fp17"]}).engines(Target("seven"))


def test_a_report_shows_facts_about_its_engines() -> None:
    proofs = proofs_of()
    assert proofs.measurements_of_report(Target("seven")) == ["build/proofs/seven/fp16/1-gpu.json"]
    assert [Path(path).name for path in proofs.facts_of_report(Target("seven"))] == ["mpt-7b.json"]
    # Its engines have two ranks.
    assert (
        proofs.measurements_of_report(Target("code"))
        == proofs.facts_of_report(Target("code"))
        == []
    )
    assert proofs.measurements_of_report(Target("tuned")) == []


def test_tensorrt_llm_has_no_measurements_of_facts() -> None:
    with pytest.raises(MptTrtError, match="build/proofs of trtllm: backend tensorrt_llm has only"):
        require_possible(plan_of(), "measure_facts", Target("seven", "trtllm"))


def test_options_of_quality() -> None:
    quality = {"text": "text.txt", "tasks": ["a", "b"], "task_dir": "tasks"}
    options = JobOptions(plan_of(quality=quality)).quality(Target("seven", "fp16"))
    assert options == ["--text=text.txt", "--task_dir=tasks", "--tasks", "a", "b"]
    without = JobOptions(plan_of(quality={"whole_text": False}))
    assert without.quality(Target("seven", "fp16")) == []
