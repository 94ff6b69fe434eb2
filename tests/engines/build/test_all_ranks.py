"""The plans of all ranks: side by side, each on a GPU of its own, and kept when others fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.engines.build import parallel
from mpt_trt.engines.build.all_ranks import build_all_plans, unfinished_folder
from mpt_trt.engines.build.rank_network import NetworkInputs, make_networks
from mpt_trt.engines.manifest import collect, read_manifest
from mpt_trt.engines.spec import BuilderChoice
from mpt_trt.engines.tensorrt.packages import installed_package
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.model.tensors import weights
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.engines import LIMITS, tree
from support.paths import tool_path

RANKS = 3
SPEC = CheckpointSpec(num_layers=1, num_heads=6)
BUILDER = BuilderChoice("tensorrt_rtx", ("8.6",))
ENGINES = [f"rank{rank}.engine" for rank in range(RANKS)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FtCheckpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    source = write_checkpoint(folder / "hf", SPEC)
    config = read_hf_config(source)
    settings = ConversionSettings("float32", RANKS, 1, "test-model", {})
    write_ft_checkpoint(HfCheckpoint(source, weights(config)), config, settings, folder / "ft")
    return read_ft_checkpoint(folder / "ft")


@pytest.fixture
def networks(checkpoint: FtCheckpoint, tmp_path: Path) -> Path:
    inputs = NetworkInputs(checkpoint, LIMITS, VocabularySharding())
    make_networks(inputs, tmp_path / "networks")
    return tmp_path / "networks"


@pytest.mark.parametrize("at_once", [1, 2])
def test_all_plans_are_built(networks: Path, tmp_path: Path, at_once: int) -> None:
    build_all_plans(networks, BUILDER, at_once, tmp_path / "plans")
    descriptions = [f"{name}.json" for name in ENGINES]
    assert tree(tmp_path / "plans") == sorted([*ENGINES, *descriptions])
    assert not unfinished_folder(tmp_path / "plans").exists()
    collect([(networks, tmp_path / "plans")] * RANKS, tmp_path / "engine")
    assert read_manifest(tmp_path / "engine").spec.tp_size == RANKS


def fail_at_last_rank(networks: Path, target: Path, at_once: int = 1) -> dict[str, int]:
    """Inodes of the plans that are finished when the last rank has failed."""
    graph = networks / f"rank{RANKS - 1}.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[: len(content) // 2])
    with pytest.raises(MptTrtError):
        build_all_plans(networks, BUILDER, at_once, target)
    assert not target.exists()
    graph.write_bytes(content)
    found = unfinished_folder(target).glob("rank*/rank*.engine")
    return {path.name: path.stat().st_ino for path in found}


@pytest.mark.parametrize("at_once", [1, 3])
def test_finished_plans_outlast_a_failure(networks: Path, tmp_path: Path, at_once: int) -> None:
    target = tmp_path / "plans"
    finished = fail_at_last_rank(networks, target, at_once)
    assert sorted(finished) == ENGINES[:-1]
    build_all_plans(networks, BUILDER, 1, target)
    for name, inode in finished.items():
        assert (target / name).stat().st_ino == inode
    collect([(networks, target)] * RANKS, tmp_path / "engine")


def edit_weight(unfinished: Path, networks: Path) -> None:
    """As if the network had been made again from other weights: its graph stays the same."""
    path = networks / "rank0.network.json"
    content = json.loads(path.read_text())
    name = next(name for name in content["files"] if name.endswith(".0.bin"))
    content["files"][name]["hash"] = "xxh3:0"
    path.write_text(json.dumps(content))


def cut_plan(unfinished: Path, networks: Path) -> None:
    plan = unfinished / "rank0" / "rank0.engine"
    os.truncate(plan, plan.stat().st_size - 1)


def lose_plan(unfinished: Path, networks: Path) -> None:
    (unfinished / "rank0" / "rank0.engine").unlink()


@pytest.mark.parametrize("change", [edit_weight, cut_plan, lose_plan])
def test_what_no_longer_fits_is_built_again(
    networks: Path, tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    target = tmp_path / "plans"
    finished = fail_at_last_rank(networks, target)
    size = (unfinished_folder(target) / "rank0" / "rank0.engine").stat().st_size
    change(unfinished_folder(target), networks)
    build_all_plans(networks, BUILDER, 1, target)
    assert (target / "rank0.engine").stat().st_ino != finished["rank0.engine"]
    assert (target / "rank1.engine").stat().st_ino == finished["rank1.engine"]
    assert (target / "rank0.engine").stat().st_size == pytest.approx(size, rel=0.05)


def test_other_gpus_to_build_for_build_all_again(networks: Path, tmp_path: Path) -> None:
    target = tmp_path / "plans"
    finished = fail_at_last_rank(networks, target)
    build_all_plans(networks, replace(BUILDER, compute_capabilities=("8.9",)), 1, target)
    assert all((target / name).stat().st_ino != inode for name, inode in finished.items())
    collect([(networks, target)] * RANKS, tmp_path / "engine")
    assert read_manifest(tmp_path / "engine").builder.compute_capabilities == ("8.9",)


def test_termination_ends_all_ranks_and_leaves_nothing_half_built(
    networks: Path, tmp_path: Path
) -> None:
    target = tmp_path / "plans"
    command = [
        sys.executable, tool_path("build_plans.py"), f"--network_dir={networks}", "--at_once=3",
        f"--output_dir={target}", "--backend=tensorrt_rtx", "--compute_capabilities=8.6",
    ]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(unfinished_folder(target).glob(".rank*partial*"))) < RANKS:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    # Of the one process alone, as Snakemake and SLURM may do it.
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGINT
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert not target.exists()
    assert not list(tmp_path.rglob(".*partial*"))
    build_all_plans(networks, BUILDER, 1, target)
    assert set(ENGINES) <= set(tree(target))


# --- GPUs ----------------------------------------------------------------------------------------

# In the place of the tool that builds a rank: it says which GPUs it may use.
REPORT = """
import argparse, os, pathlib, time
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=pathlib.Path)
target = parser.parse_known_args()[0].output_dir
target.mkdir(parents=True)
(target / "gpus").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
time.sleep(0.5)
"""


@pytest.fixture
def tensorrt_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By its metadata, which is all that is looked at before it is imported."""
    installed = tmp_path / "installed" / "tensorrt-11.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 11.0\n")
    monkeypatch.syspath_prepend(installed.parent)
    installed_package.cache_clear()
    yield
    installed_package.cache_clear()


@pytest.mark.usefixtures("tensorrt_is_installed")
@pytest.mark.parametrize(
    ("visible", "at_once", "expected"), [("3,5", 2, {"3", "5"}), ("4", 3, {"4"})]
)
def test_ranks_that_build_on_gpus_have_one_each(
    visible: str,
    at_once: int,
    expected: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool = tmp_path / "tool.py"
    tool.write_text(REPORT)
    monkeypatch.setattr(parallel, "RANK_TOOL", tool)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    targets = {rank: tmp_path / f"rank{rank}" for rank in range(3)}
    request = replace(BUILDER, backend="tensorrt")
    parallel.build_side_by_side(tmp_path, request, targets, at_once)
    found = [(path / "gpus").read_text() for path in targets.values()]
    assert set(found) == expected
    assert found[0] != found[1] or len(expected) == 1
