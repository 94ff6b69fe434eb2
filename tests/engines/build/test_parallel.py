"""Plans of several ranks: one by one, in parallel, and each on its own GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.engines.build.assemble import assemble_engine
from mpt_trt.engines.build.build import build_rank
from mpt_trt.engines.build.parallel import build_side_by_side
from mpt_trt.engines.build.rank_network import NetworkInputs, make_networks
from mpt_trt.engines.manifest import read_manifest
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
TOOL = tool_path("build_rank.py")
PLANS = [f"rank{rank}.engine" for rank in range(RANKS)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FtCheckpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    source = write_checkpoint(folder / "hf", SPEC)
    config = read_hf_config(source)
    settings = ConversionSettings("float32", RANKS, 0, "test-model", {})
    write_ft_checkpoint(HfCheckpoint(source, weights(config)), config, settings, folder / "ft")
    return read_ft_checkpoint(folder / "ft")


@pytest.fixture
def networks(checkpoint: FtCheckpoint, tmp_path: Path) -> Path:
    inputs = NetworkInputs(checkpoint, LIMITS, VocabularySharding())
    make_networks(inputs, tmp_path / "networks")
    return tmp_path / "networks"


def test_ranks_built_by_themselves_make_an_engine(networks: Path, tmp_path: Path) -> None:
    plans = tmp_path / "plans"
    for rank in (2, 0, 1):
        build_rank(networks, rank, BUILDER, plans)
    assert tree(plans) == sorted([*PLANS, *(f"{name}.json" for name in PLANS)])
    before = {name: (plans / name).stat().st_ino for name in PLANS}
    build_rank(networks, 1, BUILDER, plans)
    changed = [name for name in PLANS if (plans / name).stat().st_ino != before[name]]
    assert changed == ["rank1.engine"]
    assemble_engine([(networks, plans)] * RANKS, tmp_path / "engine")
    assert read_manifest(tmp_path / "engine").spec.tp_size == RANKS


def test_side_by_side(networks: Path) -> None:
    before = tree(networks)
    build_side_by_side(TOOL, networks, BUILDER, RANKS)
    assert tree(networks) == sorted([*before, *PLANS, *(f"{name}.json" for name in PLANS)])


def test_a_damaged_network_is_named_and_the_other_ranks_are_finished(
    networks: Path, capfd: pytest.CaptureFixture
) -> None:
    graph = networks / "rank1.onnx"
    size = graph.stat().st_size
    os.truncate(graph, size // 2)
    with pytest.raises(MptTrtError, match="rank 1 could not be built"):
        build_side_by_side(TOOL, networks, BUILDER, RANKS)
    complaint = f"{graph}: has {size // 2} bytes, but rank1.network.json records {size}; "
    assert f"{complaint}delete {networks} and make the networks again" in capfd.readouterr().err
    assert [name for name in PLANS if (networks / name).exists()] == [PLANS[0], PLANS[2]]
    assert not list(networks.rglob(".*partial*"))


@pytest.mark.parametrize("is_alone", [True, False])
def test_termination_leaves_nothing_half_built(
    networks: Path, tmp_path: Path, is_alone: bool
) -> None:
    """Terminates the process of one rank, and one that builds all."""
    target = tmp_path / "plans" if is_alone else networks
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "from mpt_trt.cli.console import run_cli\n"
        "from mpt_trt.engines.build.parallel import build_side_by_side\n"
        "from mpt_trt.engines.spec import BuilderChoice\n"
        "tool, networks, ranks = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), 3\n"
        "builder = BuilderChoice('tensorrt_rtx', ('8.6',))\n"
        "run_cli(lambda: build_side_by_side(tool, networks, builder, ranks))\n"
    )
    one = [
        *(sys.executable, TOOL, f"--network_dir={networks}", f"--output_dir={target}"),
        *("--backend=tensorrt_rtx", "--compute_capabilities=8.6"),
    ]
    all_of_them = [sys.executable, "-c", program, TOOL.parents[2], TOOL, networks]
    num_ranks = 1 if is_alone else RANKS
    command = one if is_alone else all_of_them
    tries = (started_building(command, target, num_ranks) for _ in range(10))
    process = next(filter(None, tries))
    # Only to the one process, as Snakemake and SLURM may do.
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGINT
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    # On a busy machine, some ranks may be finished before the signal comes.
    finished = list(target.glob("*.engine"))
    assert len(finished) < num_ranks
    assert all(plan.with_name(f"{plan.name}.json").exists() for plan in finished)
    assert not list(tmp_path.rglob(".*partial*"))


def started_building(
    command: list[str | Path], target: Path, num_ranks: int
) -> subprocess.Popen | None:
    """Starts the command; returns its process while so many ranks build, None if they never did."""
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(target.glob(".rank*partial*"))) < num_ranks:
        assert time.monotonic() < deadline
        if process.poll() is not None:
            assert process.returncode == 0
            for plan in target.glob("*.engine*"):
                plan.unlink()
            return None
        time.sleep(0.01)
    return process


# --- GPUs ----------------------------------------------------------------------------------------

# Replaces the tool that builds a rank; prints the GPUs that it may use.
REPORT = """
import argparse, os, pathlib, time
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=pathlib.Path)
parser.add_argument("--rank")
arguments = parser.parse_known_args()[0]
(arguments.output_dir / f"gpus{arguments.rank}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
"""


@pytest.fixture
def tensorrt_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs only its metadata, which is all that is read before the import."""
    installed = tmp_path / "installed" / "tensorrt-11.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 11.0\n")
    monkeypatch.syspath_prepend(installed.parent)
    installed_package.cache_clear()
    yield
    installed_package.cache_clear()


@pytest.mark.usefixtures("tensorrt_is_installed")
@pytest.mark.parametrize(
    ("visible", "expected"),
    [("3,5", ["3", "5", "3"]), ("4", ["4"] * 3), ("1,2,0", ["1", "2", "0"])],
)
def test_ranks_that_build_on_gpus_have_one_each(
    visible: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "tool.py"
    tool.write_text(REPORT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    build_side_by_side(tool, tmp_path, replace(BUILDER, backend="tensorrt"), RANKS)
    assert [(tmp_path / f"gpus{rank}").read_text() for rank in range(RANKS)] == expected
