"""Resources that jobs request, and commands before their own, by rule and site."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from mpt_trt.checkpoint.known_models import known_config
from mpt_trt.engines import memory
from mpt_trt.engines.tensorrt import packages
from mpt_trt.engines.tensorrt.packages import Package
from mpt_trt.errors import MptTrtError
from mpt_trt.workflow import resources
from mpt_trt.workflow.job_resources import GpuJobRequest, HostRequest, JobResources, RanksRequest
from mpt_trt.workflow.launch import Launch
from mpt_trt.workflow.plan import Plan, Target
from mpt_trt.workflow.settings import parse_settings

GPUS = {"gpus": "scheduler", "gpu_memory_gb": {"l4": 24, "a100": 80}, "gpus_per_node": 4}
NO_GPUS = {"gpus": "none"}
MPI = "srun --mpi=pmix"


def jobs_on(site: dict, **content: object) -> JobResources:
    """Makes resources for mpt-7b, which is not fetched, and a variant v."""
    models = {"seven": {"source": "mosaicml/mpt-7b"}, "thirty": {"source": "mosaicml/mpt-30b"}}
    variants = {"v": {}, "llm": {"backend": "tensorrt_llm"}}
    content = {"models": models, "variants": variants, "site": site | {"mpi": MPI}} | content
    return JobResources(Plan(parse_settings(content), Path("/repository"), Path("/nowhere")))


def target(tp: int = 1, model: str = "seven", **names: str) -> Target:
    return Target(model, tp=tp, **{"variant": "v", **names})


@pytest.fixture
def tensorrt_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed_package", lambda module: Package(module, "11.0"))


def test_jobs_without_gpus_ask_for_memory_and_time() -> None:
    jobs, config = jobs_on(GPUS | {"job_overhead_mb": 500}), known_config("mpt-7b")
    spec = jobs.plan.engine_spec(target(2))
    expected = {
        jobs.fetch_checkpoint: (resources.linking_memory(), resources.fetch_minutes(config)),
        jobs.make_networks: (resources.network_memory(spec), resources.network_minutes(spec)),
        jobs.assemble_engine: (resources.linking_memory(), resources.collect_minutes(spec)),
        jobs.compute_reference: (
            resources.reference_memory(config, 16, 512),
            resources.forward_minutes(config, 16 * 512),
        ),
    }
    for request_of, (needed, minutes) in expected.items():
        assert request_of(target(2)) == HostRequest(math.ceil(needed / 1e6) + 500, minutes)


def test_conversion_needs_memory_for_each_worker() -> None:
    jobs, plain = jobs_on(NO_GPUS), target(2, storage="fp16")
    two, four = (jobs.convert_checkpoint(plain, threads=threads) for threads in (2, 4))
    assert two.mem_mb < four.mem_mb and two.runtime == four.runtime
    smoothed = jobs.convert_smoothquant_checkpoint(target(2, storage="sq"))
    assert smoothed.runtime > two.runtime and smoothed.mem_mb > four.mem_mb


@pytest.mark.parametrize(
    ("site", "device", "gpus"),
    [(GPUS, "auto", 1), (GPUS, "cpu", 0), (NO_GPUS, "auto", 0), (GPUS, "cuda", 1)],
)
def test_calibration_takes_a_gpu_where_there_is_one(site: dict, device: str, gpus: int) -> None:
    jobs = jobs_on(site, calibration={"device": device})
    request = jobs.quantize(target(qformat="fp8"))
    assert (request.gpu, request.gpu_model) == ((1, "l4") if gpus else (None, None))
    launcher = Launch(jobs).quantize(target(qformat="fp8"))
    script = "/repository/workflow_scripts/steps/with_gpus.py"
    assert launcher.gpus == ["python", script, f"--gpus={gpus}", "--"]


@pytest.mark.usefixtures("tensorrt_is_installed")
def test_a_rank_is_built_on_a_gpu_of_its_own_by_tensorrt() -> None:
    jobs = jobs_on(GPUS)
    spec = jobs.plan.engine_spec(target(8))
    assert jobs.build_rank(target(8)) == GpuJobRequest(
        mem_mb=math.ceil(resources.build_memory(spec) / 1e6),
        runtime=resources.build_minutes(spec),
        gpu=1,
        gpu_model="l4",
    )
    launcher = Launch(jobs).build_rank(target(8))
    assert "--gpus=1" in launcher.gpus and "--once=logs/preflight" in launcher.preflight
    assert launcher.ranks == []


def test_no_gpu_is_needed_to_build_with_tensorrt_rtx() -> None:
    jobs = jobs_on(GPUS, variants={"v": {"backend": "tensorrt_rtx"}})
    request = jobs.build_rank(target(8))
    assert (request.gpu, request.gpu_model, request.gres, request.nodes) == (None, None, None, 1)
    launcher = Launch(jobs).build_rank(target(8))
    assert launcher.preflight == launcher.gpus == launcher.ranks == []


@pytest.mark.parametrize(
    ("tp", "expected"),
    [
        (1, {"gpu": 1, "nodes": 1}),
        (2, {"gpu": 2, "nodes": 1, "tasks_per_node": 2, "tasks_per_gpu": 0, "mpi": MPI}),
        (8, {"gpu": 8, "nodes": 2, "tasks_per_node": 4, "tasks_per_gpu": 0, "mpi": MPI}),
    ],
)
def test_ranks_run_on_a_gpu_each(tp: int, expected: dict) -> None:
    jobs = jobs_on(GPUS)
    spec = jobs.plan.engine_spec(target(tp))
    request = jobs.smoke_test(target(tp))
    found = {name: value for name, value in asdict(request).items() if value is not None}
    needed = resources.smoke_test_memory(spec, expected["nodes"])
    assert found.pop("mem_mb") == math.ceil(needed / 1e6)
    assert found.pop("runtime") > 10
    model = "l4" if memory.gpu_memory(spec) <= 24e9 else "a100"
    assert found == {"gpu_model": model, **expected}
    launcher = Launch(jobs).smoke_test(target(tp))
    assert f"--gpus={tp // expected['nodes']}" in launcher.gpus
    assert launcher.ranks == ([] if tp == 1 else ["srun", "--mpi=pmix", "-n", str(tp)])


def test_one_rank_per_node_is_said_by_tasks() -> None:
    request = jobs_on(GPUS | {"gpus_per_node": 1}).measure_quality(target(2))
    assert (request.nodes, request.tasks, request.tasks_per_node) == (2, 2, None)


def test_without_gpus_ranks_run_on_one_machine_and_see_none() -> None:
    jobs = jobs_on(NO_GPUS)
    request = jobs.smoke_test(target(2))
    assert (request.gpu, request.nodes, request.mpi) == (None, 1, MPI)
    launcher = Launch(jobs).smoke_test(target(2))
    assert "--gpus=0" in launcher.gpus and launcher.preflight == []


def test_tensorrt_llm_builds_all_ranks_at_a_time() -> None:
    jobs, two = jobs_on(GPUS), target(2, variant="llm")
    spec = jobs.plan.engine_spec(two)
    built = jobs.build_trtllm_engine(two)
    assert (built.gpu, built.mem_mb) == (2, math.ceil(2 * resources.build_memory(spec) / 1e6))
    run = jobs.run_trtllm(two)
    assert isinstance(run, RanksRequest) and (run.gpu, run.mpi) == (2, MPI)
    assert jobs.compare_trtllm(two) == HostRequest(run.mem_mb, run.runtime)
    assert Launch(jobs).run_trtllm(two).ranks == ["srun", "--mpi=pmix", "-n", "2"]


def test_gpus_that_are_too_small_are_refused() -> None:
    jobs = jobs_on(GPUS | {"gpu_memory_gb": {"l4": 24}})
    with pytest.raises(MptTrtError, match="use more ranks"):
        jobs.smoke_test(target(1, model="thirty"))


def test_preflight_looks_at_the_targets_that_are_engines() -> None:
    names = ["trt_engines/seven/v/2-gpu", "smoke_tests/seven/llm/2-gpu.json", "reports/seven.html"]
    jobs = jobs_on(NO_GPUS, targets=names * 200)
    needs = json.loads(Launch(jobs).needs_of_targets(Target()))
    assert len(needs) == 200 and [need["target"] for need in needs[:2]] == names[:2]
    spec = jobs.plan.engine_spec(target(2))
    assert needs[0]["build_memory"] == resources.build_memory(spec)
    assert needs[1]["build_memory"] == 2 * resources.build_memory(spec)
    assert needs[0]["ranks"] == 2
