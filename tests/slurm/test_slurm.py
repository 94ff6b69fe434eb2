"""The workflow as jobs of a real SLURM, judged by SLURM's own records and by what comes out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mpt_trt.system.files import content_hash
from mpt_trt.workflow.resources import BUILD_BASE
from slurm.toy_cluster import GPU_MODEL, GPUS_PER_NODE, Job, ToyCluster, toy_cluster, wait_until
from support.forks.servers import forked_python
from support.workflow import COPIED, LINKED, REPOSITORY

pytestmark = pytest.mark.slurm

MODEL = "mpt-demo"
VARIANT = "int4_awq"
FT_CHECKPOINT = f"ft_ckpts/{MODEL}/fp16/2-gpu"
NETWORKS = f"build/networks/{MODEL}/{VARIANT}/2-gpu"
ENGINE = f"trt_engines/{MODEL}/{VARIANT}/2-gpu"
SMOKE_TEST = f"smoke_tests/{MODEL}/{VARIANT}/2-gpu.json"
SITE = {
    "gpus": "scheduler",
    "gpus_per_node": GPUS_PER_NODE,
    "gpu_memory_gb": {GPU_MODEL: 40},
    "mpi": "srun --mpi=pmix",
    "job_overhead_mb": 500,
}
SNAKEMAKE = Path(__file__).parent / "prompt_snakemake.py"
# No slurmdbd is there for sacct, and the jobs take seconds.
QUICK = (
    "--slurm-status-command=squeue",
    "--slurm-init-seconds-before-status-checks=1",
    "--latency-wait=10",
    "--slurm-no-account",
)
# Jobs never have more threads than Snakemake has cores where it submits them.
CORES = "--cores=8"
RUN_SECONDS = 600
# The whole text would take most of the time.
SMALL_CALIBRATION = {"calibration": {"num_samples": 4, "sequence_length": 64}}


@dataclass(frozen=True)
class Project:
    """A working directory with the repository's configuration and a copy of its code."""

    folder: Path
    cluster: ToyCluster

    @classmethod
    def create(cls, folder: Path, cluster: ToyCluster) -> Project:
        folder.mkdir(parents=True)
        for name in (*LINKED, *COPIED):
            source, target = REPOSITORY / name, folder / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, target, ignore=ignored)
            else:
                shutil.copy(source, target)
        shutil.copy(REPOSITORY / "config.yaml", folder)
        (folder / "site.yaml").write_text(yaml.safe_dump(SMALL_CALIBRATION | {"site": SITE}))
        return cls(folder, cluster)

    def start(self, target: str, python: str | None = None) -> subprocess.Popen[str]:
        """Starts to make a target; the jobs use a stand-in for Python by default."""
        command = [
            sys.executable, SNAKEMAKE, python or forked_python(),
            "--profile", "profiles/slurm", CORES, *QUICK, "--configfile", "site.yaml", "--", target,
        ]  # fmt: skip
        with (self.folder / "output.txt").open("w") as output:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | self.cluster.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def finish(self, process: subprocess.Popen[str]) -> None:
        try:
            status = process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            status = f"not ended after {RUN_SECONDS} s"
        finally:
            process.kill()
        output = (self.folder / "output.txt").read_text()
        assert status == 0, f"{status}\n{output[-5000:]}\n{self.cluster.call('squeue')}"

    def jobs(self) -> list[Job]:
        """Jobs of this project; others may share the cluster."""
        return [job for job in self.cluster.jobs() if job.fields["WorkDir"] == str(self.folder)]

    def hashes(self, path: str) -> dict[str, str]:
        folder = self.folder / path
        # Manifests record the absolute path of the checkpoint, which differs between projects.
        files = [
            file
            for file in folder.rglob("*")
            if file.is_file() and file.name[0] != "." and file.suffix != ".json"
        ]
        return {str(file.relative_to(folder)): content_hash(file) for file in files}

    def engine(self) -> tuple[dict[str, str], dict[str, int], dict]:
        """Hashes of the engine's files, sizes of its plans, and config.json without what differs.

        TensorRT builds no two plans of the same bytes, even of the same network.
        """
        hashes = self.hashes(ENGINE)
        plans = [name for name in hashes if name.endswith(".engine")]
        for name in plans:
            del hashes[name]
        sizes = {name: (self.folder / ENGINE / name).stat().st_size for name in plans}
        config = json.loads((self.folder / ENGINE / "config.json").read_text())
        del config["provenance"]
        for rank in config["ranks"]:
            for name, recorded in rank["files"].items():
                if name == rank["engine"] or name.endswith(".json"):
                    del recorded["hash"]
        return hashes, sizes, config


@pytest.fixture(scope="module")
def cluster() -> Iterator[ToyCluster]:
    with toy_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def made(cluster: ToyCluster, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose smoke test ran on one node."""
    project = Project.create(tmp_path_factory.mktemp("one") / "project", cluster)
    project.finish(project.start(SMOKE_TEST))
    return project


def of_rule(project: Project, rule: str) -> list[Job]:
    return [job for job in project.jobs() if job.rule == rule]


def test_every_step_is_a_job_that_asks_for_what_it_needs(made: Project) -> None:
    rules = {"convert_checkpoint": 1, "make_networks": 1, "build_rank": 2, "assemble_engine": 1}
    jobs = [job for rule in rules for job in of_rule(made, rule)]
    assert Counter(job.rule for job in jobs) == rules
    for job in jobs:
        assert job.fields["JobState"] == "COMPLETED"
        assert (job.gpus_asked_for, job.gpus_given) == ("", "")
        assert job.fields["TimeLimit"] != "1-00:00:00"
        assert int(job.fields["MinMemoryNode"].removesuffix("M")) > SITE["job_overhead_mb"]


def test_each_rank_is_built_by_a_job_of_its_own(made: Project) -> None:
    jobs = of_rule(made, "build_rank")
    assert sorted(job.wildcards[-1] for job in jobs) == ["0", "1"]
    for job in jobs:
        assert (job.fields["NumNodes"], job.fields["CPUs/Task"]) == ("1", "2")
        memory = int(job.fields["MinMemoryNode"].removesuffix("M"))
        assert BUILD_BASE / 1e6 < memory - SITE["job_overhead_mb"] < 2 * BUILD_BASE / 1e6


def test_calibration_asks_for_one_gpu_and_gets_it(made: Project) -> None:
    (job,) = of_rule(made, "quantize")
    assert job.gpus_asked_for == f"gres:gpu:{GPU_MODEL}:1"
    assert job.gpus_given == f"gpu:{GPU_MODEL}:1"


def test_smoke_test_asks_for_a_gpu_a_rank_and_gets_them(made: Project) -> None:
    (job,) = of_rule(made, "smoke_test")
    assert job.gpus_asked_for == f"gres:gpu:{GPU_MODEL}:2"
    assert job.gpus_given == f"gpu:{GPU_MODEL}:2"
    assert (job.fields["NumNodes"], job.fields["NumTasks"]) == ("1", "2")
    log = (made.folder / f"logs/smoke_test/{MODEL}/{VARIANT}/2-gpu.log").read_text()
    assert "GPUs of this job: " in log
    result = json.loads((made.folder / SMOKE_TEST).read_text())
    assert result["passed"] and result["ranks"] == 2


def test_an_engine_may_take_several_nodes(made: Project) -> None:
    """Each rank gets a node, requested with --gres; the engine already exists.

    Uses no stand-in for Python.
    """
    site = SITE | {"gpus_per_node": 1, "gpu_request": "gres"}
    (made.folder / "site.yaml").write_text(yaml.safe_dump(SMALL_CALIBRATION | {"site": site}))
    first = made.folder / SMOKE_TEST
    tokens = json.loads(first.read_text())["tokens"]
    first.unlink()
    (made.folder / "build" / SMOKE_TEST).unlink()
    before = len(made.jobs())
    made.finish(made.start(SMOKE_TEST, sys.executable))
    (job,) = made.jobs()[before:]
    assert job.rule == "smoke_test"
    assert job.gpus_asked_for == f"gres:gpu:{GPU_MODEL}:1"
    assert job.gpus_given == f"gpu:{GPU_MODEL}:2"
    assert (job.fields["NumNodes"], job.fields["NumTasks"]) == ("2", "2")
    assert json.loads(first.read_text())["tokens"] == tokens


def test_a_lost_node_changes_nothing(made: Project, cluster: ToyCluster, tmp_path: Path) -> None:
    project = Project.create(tmp_path / "project", cluster)
    process = project.start(ENGINE)

    def running() -> list[Job]:
        jobs = of_rule(project, "build_rank")
        return [job for job in jobs if job.fields["JobState"] == "RUNNING"]

    wait_until(running, RUN_SECONDS)
    (node,) = {job.fields["NodeList"] for job in running()[:1]}
    lost = [job.fields["JobId"] for job in running() if job.fields["NodeList"] == node]
    cluster.lose_node(node, lost)
    wait_until(lambda: cluster.node_states()[node].startswith("down"), 60)
    cluster.start_node(node)
    for job_id in lost:
        # SLURM itself waits for a while, in which a real node would start again.
        cluster.call("scontrol", "update", f"JobId={job_id}", "StartTime=now")
    project.finish(process)
    restarts = {job.fields["JobId"]: int(job.fields["Restarts"]) for job in project.jobs()}
    assert all(restarts[job_id] >= 1 for job_id in lost)
    for folder in (FT_CHECKPOINT, NETWORKS):
        assert project.hashes(folder) == made.hashes(folder) != {}
    assert project.engine() == made.engine()
