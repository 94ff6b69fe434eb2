"""GPUs that jobs request: number, kind and nodes, also in the rules."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mpt_trt.checkpoint.known_models import SHIPPED, known_config
from mpt_trt.engines.memory import GB
from mpt_trt.engines.spec import BuildLimits, EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.model.sharding import VocabularySharding, is_legal
from mpt_trt.quantization.schemes import Quantization, WeightOnly
from mpt_trt.system import gpu_locks, gpus
from mpt_trt.workflow import gpu_request, resources
from mpt_trt.workflow.gpu_request import GpuRequest
from mpt_trt.workflow.settings import Site, parse_settings
from support.forks.servers import forked_python
from support.workflow import REPOSITORY, Workflow

Resources = dict[str, dict[str, str]]

CLUSTER = Site("scheduler", "gpus", {"a100": 80.0, "l4": 24.0, "t4": 16.0}, 4, "srun", None, 0)


# --- of a cluster --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "model"), [(1 * GB, "t4"), (16 * GB, "t4"), (17 * GB, "l4"), (80 * GB, "a100")]
)
def test_the_smallest_gpu_that_holds_a_rank(memory: int, model: str) -> None:
    assert gpu_request.gpu_request(CLUSTER, 2, memory) == GpuRequest(gpu=2, gpu_model=model)


def test_gpus_that_are_too_small_are_refused() -> None:
    with pytest.raises(MptTrtError, match=r"needs 81\.0 GB .* a100 with 80 GB; use more ranks"):
        gpu_request.gpu_request(CLUSTER, 1, 81 * GB)


def test_gres_counts_the_gpus_of_a_node() -> None:
    site = replace(CLUSTER, gpu_request="gres")
    assert gpu_request.gpu_request(site, 8, GB) == GpuRequest(gres="gpu:t4:4")
    plain = replace(site, gpu_memory_gb={})
    assert gpu_request.gpu_request(plain, 6, GB) == GpuRequest(gres="gpu:3")


def test_no_gpus_are_not_mentioned() -> None:
    assert gpu_request.gpu_request(CLUSTER, 0, 10**15) == GpuRequest()


@given(ranks=st.integers(1, 64), gpus_per_node=st.integers(1, 16))
def test_ranks_divide_evenly_among_the_fewest_nodes(ranks: int, gpus_per_node: int) -> None:
    nodes = gpu_request.num_nodes(replace(CLUSTER, gpus_per_node=gpus_per_node), ranks)
    assert ranks % nodes == 0
    assert ranks // nodes <= gpus_per_node
    fewer = [n for n in range(1, nodes) if ranks % n == 0 and ranks // n <= gpus_per_node]
    assert fewer == []


# --- of this machine -----------------------------------------------------------------------------


@pytest.mark.skipif(bool(gpus.identifiers()), reason="a driver knows better")
def test_declared_gpus_are_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu_locks.DECLARED, "2")
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    site = parse_settings({}).site
    assert gpu_request.has_gpus(site)
    gpu_request.require_gpus(site, 2)
    with pytest.raises(MptTrtError, match=r"3 GPUs are needed, but there are 2"):
        gpu_request.require_gpus(site, 3)
    without = replace(site, gpus="none")
    assert not gpu_request.has_gpus(without)
    with pytest.raises(MptTrtError, match=r"site\.gpus = none"):
        gpu_request.require_gpus(without, 1)


def test_a_machine_is_one_node_and_its_gpus_are_of_no_named_kind() -> None:
    site = replace(CLUSTER, gpus="auto")
    assert gpu_request.num_nodes(site, 64) == 1
    assert gpu_request.gpu_request(site, 2, 10**15) == GpuRequest(gpu=2)


# --- in the workflow -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """A workflow with a hub model that is not on disk; nothing is made in it."""
    made = Workflow.create(tmp_path_factory.mktemp("workflow") / "project")
    made.configure(int4={"quantization": {"method": "int4_weight_only"}})
    path = made.folder / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["models"]["thirty"] = {"source": "mosaicml/mpt-30b"}
    path.write_text(yaml.safe_dump(content))
    return made


def planned_resources(workflow: Workflow, *arguments: str, **environment: str) -> Resources:
    """Parses Snakemake's threads, if more than one, and resources, by rule and name."""
    result = workflow.run("--dry-run", *arguments, **environment)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    found: Resources = {}
    rule = ""
    for line in output.splitlines():
        if match := re.match(r"(?:local)?rule (\w+):", line):
            rule = match[1]
        elif match := re.match(r" +threads: (.*)", line):
            found[rule] = {"threads": match[1]}
        elif match := re.match(r" +resources: (.*)", line):
            pairs = dict(pair.split("=", 1) for pair in match[1].split(", "))
            found[rule] = found.get(rule, {}) | pairs
    return found


def site_options(workflow: Workflow, **site: object) -> tuple[str, ...]:
    path = workflow.folder / "site.yaml"
    path.write_text(yaml.safe_dump({"site": {"gpus": "scheduler", **site}}))
    return "--configfile", str(path), "--"


def test_only_smoke_tests_ask_a_scheduler_for_gpus(workflow: Workflow) -> None:
    options = site_options(workflow, gpu_memory_gb={"l4": 24, "a100": 80}, gpus_per_node=2)
    found = planned_resources(workflow, *options, "smoke_tests/thirty/fp16/4-gpu.json")
    for rule in ("convert_checkpoint", "make_networks", "build_rank", "assemble_engine"):
        assert not {"gpu", "gpu_model", "gres"} & found[rule].keys()
        assert int(found[rule]["mem_mb"]) > 0 and int(found[rule]["runtime"]) > 0
    asked = found["smoke_test"]
    assert (asked["gpu"], asked["gpu_model"], asked["nodes"]) == ("4", "l4", "2")
    assert asked["tasks_per_node"] == "2" and "tasks" not in asked


def test_one_rank_a_node_is_said_by_tasks(workflow: Workflow) -> None:
    options = site_options(workflow, gpus_per_node=1, mpi="srun --mpi=pmix")
    found = planned_resources(workflow, *options, "smoke_tests/toy/fp16/2-gpu.json")
    asked = found["smoke_test"]
    assert (asked["tasks"], asked["nodes"], asked["mpi"]) == ("2", "2", "srun --mpi=pmix")
    assert "tasks_per_node" not in asked


def tensorrt_for_data_centres(workflow: Workflow) -> dict[str, str]:
    """An environment with its metadata, which is all that planning reads."""
    fake = workflow.folder / "installed" / "tensorrt_cu13-11.0.dist-info"
    fake.mkdir(parents=True, exist_ok=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt_cu13\nVersion: 11.0\n")
    return {"PYTHONPATH": str(fake.parent)}


def test_each_rank_is_built_by_a_job_that_asks_for_one_gpu(workflow: Workflow) -> None:
    options = site_options(workflow, gpu_memory_gb={"a100": 80}, gpus_per_node=2)
    command = ("--cores", "64", *options, "trt_engines/thirty/int4/4-gpu")
    environment = tensorrt_for_data_centres(workflow)
    result = workflow.run("--dry-run", *command, **environment)
    assert re.search(r"^build_rank +4$", result.stdout + result.stderr, re.MULTILINE)
    asked = planned_resources(workflow, *command, **environment)["build_rank"]
    assert (asked["gpu"], asked["gpu_model"], asked["nodes"]) == ("1", "a100", "1")
    config, limits = known_config("mpt-30b"), BuildLimits(8, 512, 64)
    quantization = Quantization(WeightOnly(4))
    spec = EngineSpec(config, "float16", 4, limits, VocabularySharding(), quantization)
    assert int(asked["mem_mb"]) == math.ceil(resources.build_memory(spec) / 1e6)
    assert int(asked["runtime"]) == resources.build_minutes(spec)
    assert int(asked["threads"]) == 2


@pytest.mark.skipif(bool(gpus.identifiers()), reason="a driver knows better")
def test_too_many_ranks_for_this_machine_are_refused_when_planning(workflow: Workflow) -> None:
    target = "smoke_tests/toy/fp16/3-gpu.json"
    result = workflow.run("--dry-run", target, MPT_TRT_GPUS="2")
    assert result.returncode != 0
    assert "3 GPUs are needed, but there are 2" in result.stdout + result.stderr
    assert planned_resources(workflow, target, MPT_TRT_GPUS="3")["smoke_test"]["gpu"] == "3"
    assert "gpu" not in planned_resources(workflow, target)["smoke_test"]


@pytest.mark.skipif(bool(gpus.identifiers()), reason="a driver knows better")
def test_gpus_are_handed_out_and_another_site_repeats_nothing(workflow: Workflow) -> None:
    target = "smoke_tests/toy/fp16/2-gpu.json"
    result = workflow.run(target, MPT_TRT_GPUS="3")
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert re.search(r"GPUs of this job: \d, \d$", output, re.MULTILINE)
    assert "This machine" in output and list((workflow.folder / "logs/preflight").iterdir())
    assert workflow.planned(target) == []
    assert workflow.planned(*site_options(workflow, mpi="srun"), target) == []


@pytest.mark.skipif(bool(gpus.identifiers()), reason="a driver knows better")
def test_two_workflows_wait_for_gpus_and_one_may_be_killed(
    workflow: Workflow, tmp_path: Path
) -> None:
    """Three of four GPUs are taken, and each workflow needs two."""
    target = "build/smoke_tests/toy/fp16/2-gpu.json"
    workflow.make(target)
    (workflow.folder / target).unlink()
    other = shutil.copytree(workflow.folder, tmp_path / "other", symlinks=True)
    scope = f"test-{os.getpid()}"
    held = gpu_locks.acquire(3, gpu_locks.Devices(("0", "1", "2", "3"), "a test"), scope)
    environment = os.environ | {"MPT_TRT_GPUS": "4", gpu_locks.SCOPE: scope}
    command = ["-m", "snakemake", "--cores", "1", target, "--quiet", "all"]
    folders = (workflow.folder, other)
    logs = [folder / "logs/smoke_test/toy/fp16/2-gpu.log" for folder in folders]
    for log in logs:
        log.unlink()
    processes = [
        subprocess.Popen([python, *command], cwd=folder, env=environment, start_new_session=True)
        # The one that is killed is not forked.
        for folder, python in zip(folders, (sys.executable, forked_python()), strict=True)
    ]
    deadline = time.monotonic() + 120
    while not all(log.exists() and "waiting for 2 free GPUs" in log.read_text() for log in logs):
        assert time.monotonic() < deadline and not any(each.poll() for each in processes)
        time.sleep(0.05)
    os.killpg(processes[0].pid, signal.SIGKILL)
    assert processes[0].wait(10) == -signal.SIGKILL
    assert processes[1].poll() is None
    held.release()
    assert processes[1].wait(120) == 0
    assert "GPUs of this job" in logs[1].read_text()
    assert not (workflow.folder / target).exists()


def test_every_shipped_model_can_be_planned_for_slurm() -> None:
    """Through the profile, for all numbers of ranks that are legal."""
    names = yaml.safe_load((REPOSITORY / "config.yaml").read_text())["models"]
    assert set(names) - set(SHIPPED) == {"mpt-demo"}
    targets = [
        f"smoke_tests/{name}/fp16/{tp}-gpu.json"
        for name in SHIPPED
        for tp in (1, 2, 4, 8)
        if is_legal(known_config(name), tp)
    ]
    command = ("--profile", "profiles/slurm", "--", "smoke_tests/mpt-demo/fp16/1-gpu.json")
    found = planned_resources(Workflow(REPOSITORY), *command, *targets)
    assert int(found["smoke_test"]["gpu"]) >= 1


def test_preflight_says_what_is_missing(workflow: Workflow) -> None:
    for _ in range(2):  # it is never up to date
        targets = "targets=[trt_engines/thirty/fp32/1-gpu,smoke_tests/toy/fp16/1-gpu.json]"
        result = workflow.run("preflight", "--config", targets, COLUMNS="200")
        output = " ".join((result.stdout + result.stderr).replace("│", " ").split())
        assert result.returncode == 0, output
        assert "ONNX Runtime" in output and "TensorRT-RTX" in output
        assert "of memory" in output and "trt_engines/thirty/fp32/1-gpu no: needs" in output
