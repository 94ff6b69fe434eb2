"""Values of a plan as Snakemake asks rules for them."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from mpt_trt.workflow.job_resources import HostRequest, JobResources
from mpt_trt.workflow.last_words import LastWords
from mpt_trt.workflow.plan import Plan, Target
from mpt_trt.workflow.rule_values import RuleValues
from mpt_trt.workflow.settings import parse_settings
from support.paths import REPOSITORY

CONTENT = {"models": {"m": {"source": "owner/mpt-7b"}}, "variants": {"v": {}}}
# Snakemake's Wildcards have no other method that is used.
WILDCARDS = {"model": "m", "variant": "v", "tp": "2"}


class Shown(Exception):
    """Like Snakemake's WorkflowError."""


@pytest.fixture(scope="module")
def values() -> RuleValues:
    settings = parse_settings(CONTENT | {"site": {"gpus": "none"}})
    return RuleValues(Plan(settings, REPOSITORY, Path("/nowhere")), Shown, LastWords())


def test_wildcards_become_a_target(values: RuleValues) -> None:
    assert values.of_job(lambda target: target)(WILDCARDS) == Target("m", "v", tp=2)


def test_further_arguments_are_known_by_name(values: RuleValues) -> None:
    value = values.of_job(lambda target, threads: (target.tp, threads))
    assert list(inspect.signature(value).parameters) == ["target", "threads"]
    assert value(WILDCARDS, threads=3) == (2, 3)


def test_refusals_are_shown_without_a_traceback(values: RuleValues) -> None:
    refused = WILDCARDS | {"rank": "2"}
    with pytest.raises(Shown, match=r"the last one is rank1\.engine") as caught:
        values.require_possible("build_rank")(refused)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert values.require_possible("build_rank")(WILDCARDS) == []


def test_system_errors_are_shown_without_a_traceback(values: RuleValues) -> None:
    def read(_: Target) -> None:
        raise PermissionError(13, "Permission denied", "/private/model")

    with pytest.raises(Shown, match=r"^/private/model: Permission denied$"):
        values.of_job(read)(WILDCARDS)


class CountingResources(JobResources):
    """Remembers the targets that requests were made for."""

    def convert_checkpoint(self, target: Target, threads: int) -> HostRequest:
        made.append(target)
        return super().convert_checkpoint(target, threads)


made: list[Target] = []


def test_a_request_is_made_once_for_all_resources_of_a_job(values: RuleValues) -> None:
    jobs, target = CountingResources(values.plan), Target("m", tp=2, storage="fp16")
    wildcards = {"model": "m", "tp": "2", "storage": "fp16"}
    resources = values.resources_of(jobs.convert_checkpoint)
    found = {name: value(wildcards, threads=2) for name, value in resources.items()}
    assert made == [target]
    assert found == vars(jobs.convert_checkpoint(target, threads=2))


@pytest.mark.parametrize("gpus", ["none", "auto", "scheduler"])
@pytest.mark.parametrize("rule", ["quantize", "build_rank", "smoke_test", "measure_quality"])
def test_only_resources_that_no_job_of_the_site_has_are_left_out(gpus: str, rule: str) -> None:
    site = {"gpus": gpus, "gpu_memory_gb": {"l4": 24}}
    plan = Plan(parse_settings(CONTENT | {"site": site}), REPOSITORY, Path("/nowhere"))
    request_of = getattr(JobResources(plan), rule)
    resources = RuleValues(plan, Shown, LastWords()).resources_of(request_of)
    for tp in (1, 2):
        target = Target("m", "v", tp=tp, qformat="fp8")
        expected = vars(request_of(target))
        found = {name: resources[name](vars(target)) for name in resources}
        assert {name: value for name, value in found.items() if value is not None} == {
            name: value for name, value in expected.items() if value is not None
        }
    assert {"gpu_model", "gres"} <= resources.keys() or gpus != "scheduler"


def test_a_tool_is_recorded_by_its_version_only(values: RuleValues) -> None:
    """Snakemake records values of built-in types: not a Path."""
    tool = values.tool("steps/build_rank.py")
    assert isinstance(tool["tool"], Path) and tool["tool"].is_file()
    assert isinstance(tool["code"], str)
    assert tool["code"] != values.tool("steps/make_networks.py")["code"]
