"""Ranks as processes under mpirun, with ONNX Runtime: what they compute, and how they end.

`test_ranks.py` holds the networks against the plain model; here it is one rank that the others are
held against. Every start of mpirun has a time limit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.engines.build.build import build_engine
from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.engines.load import load_engine
from mpt_trt.engines.rank_descriptions import engine_name, read_network_hash, write_plan_description
from mpt_trt.engines.spec import BuilderChoice, BuilderInfo, BuildLimits
from mpt_trt.evaluation.quality_result import read_quality
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
from mpt_trt.model.sharding import Rank, VocabularySharding
from mpt_trt.model.tensors import weights
from mpt_trt.system.files import content_hash
from support import mpi_driver
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.engines import (
    COMPUTE_CAPABILITIES,
    LIMITS,
    call_tool,
    make_rank_network,
    one_line_error,
)
from support.forks.servers import forked_python
from support.paths import tool_path
from support.processes import require_ended
from support.workflow import SMALL, Workflow

# Where ranks meet in a sum or a gather: K/V heads on two ranks each at 4, norms across ranks, a
# vocabulary that does not divide evenly.
SPEC = CheckpointSpec(num_heads=8, num_kv_heads=2, qk_ln=True, no_bias=False, vocab_size=131)
WHOLE = VocabularySharding(embedding=False, head=False)
BOTH = VocabularySharding(embedding=True, head=True)

# Largest difference to one rank, as a multiple of the largest logit. Sums over ranks are added in
# another order than over one matrix: float32 rounds them to 6e-8 each, float16 the ranks' partial
# results to 5e-4. bfloat16 is computed in float32 on a CPU.
FLOAT32_BOUND = 1e-5
FLOAT16_BOUND = 5e-3

# pip puts it next to Python, which need not be on the PATH.
MPIRUN = Path(sys.executable).with_name("mpirun")
TIME_LIMIT_S = 120
# Longer than one rank takes more than the other to load its engine on a busy machine.
PATIENCE_S = 10


@dataclass(frozen=True)
class Finished:
    """mpirun's end. seconds: how long it ran."""

    status: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """Lines of mpt-trt's messages; mpirun adds its own, and sometimes a NUL after them."""
        lines = (self.stdout + self.stderr).replace("\0", "").splitlines()
        assert not any("Traceback" in line or "terminate called" in line for line in lines)
        return [line.strip() for line in lines if line.strip().startswith("error")]


def mpirun(
    size: int, script: Path, *arguments: object, python: str | None = None, **environment: str
) -> Finished:
    """Runs a script on several ranks. python: sys.executable where forks would differ."""
    command = [MPIRUN, "-n", size, "--oversubscribe", "--allow-run-as-root"]
    command.append(python or forked_python())
    paths = os.pathsep.join(path for path in sys.path if path)
    started = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in (*command, script, *arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # mpirun then ends the ranks
        stdout, stderr = process.communicate(timeout=30)
        pytest.fail(f"the ranks hang: {stdout}{stderr}")
    return Finished(process.returncode, stdout, stderr, time.monotonic() - started)


def drive(size: int, *arguments: object, python: str | None = None, **environment: str) -> Finished:
    script = Path(mpi_driver.__file__)
    return mpirun(size, script, *arguments, python=python, **environment)


# --- engines -------------------------------------------------------------------------------------


class Engines:
    """Makes engine directories by name, once each. Their plans are empty: no GPU will read them."""

    def __init__(self, folder: Path, limits: BuildLimits = LIMITS):
        self.folder, self.limits = folder, limits
        self.hf = write_checkpoint(folder / "hf", SPEC)

    def make(self, tp_size: int, storage: str, vocabulary: VocabularySharding = BOTH) -> Path:
        sharded = "sharded" if vocabulary.head else "whole"
        target = self.folder / f"{storage}-{tp_size}-{sharded}"
        if not target.exists():
            builder = BuilderChoice("tensorrt_rtx", COMPUTE_CAPABILITIES)
            checkpoint = read_ft_checkpoint(self.convert(tp_size, storage))
            inputs = NetworkInputs(checkpoint, self.limits, vocabulary)
            build_engine(inputs, builder, target, write_empty_plans)
        return target

    def convert(self, tp_size: int, storage: str) -> Path:
        target = self.folder / storage / f"{tp_size}-gpu"
        if not target.exists():
            config = read_hf_config(self.hf)
            settings = ConversionSettings(storage, tp_size, 0, "test-model", {})
            checkpoint = HfCheckpoint(self.hf, weights(config))
            write_ft_checkpoint(checkpoint, config, settings, target)
        return target


def write_empty_plans(folder: Path, builder: BuilderChoice, tp_size: int) -> None:
    builder_info = BuilderInfo("tensorrt_rtx", "0", builder.compute_capabilities)
    for rank in range(tp_size):
        plan = folder / engine_name(rank)
        plan.write_bytes(b"")
        known = content_hash(plan)
        network_hash = read_network_hash(folder, rank)
        write_plan_description(plan, known, network_hash, builder_info)


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"))


# --- numbers -------------------------------------------------------------------------------------


KINDS = [
    (2, "float32", BOTH),
    (2, "float32", WHOLE),
    (2, "float16", BOTH),
    (2, "bfloat16", BOTH),
    (4, "float32", BOTH),
    (4, "float16", BOTH),
]


@pytest.fixture(scope="module")
def recorded(engines: Engines, tmp_path_factory) -> Path:
    """Records of `mpi_driver` for every kind of engine, with one mpirun per number of ranks."""
    folder = tmp_path_factory.mktemp("recorded")
    for size in (2, 4):
        paths = [engines.make(*kind) for kind in KINDS if kind[0] == size]
        finished = drive(size, "record", folder, *paths)
        assert finished.status == 0, finished.stderr
        assert finished.stdout == ""
    return folder


@pytest.fixture(scope="module")
def alone(engines: Engines) -> dict[str, dict[str, np.ndarray]]:
    """The same of one rank, by storage type."""
    paths = {storage: engines.make(1, storage) for _, storage, _ in KINDS}
    return {
        storage: mpi_driver.record(load_engine(path, "onnxruntime", num_threads=1))
        for storage, path in paths.items()
    }


def of_ranks(recorded: Path, engine: Path, size: int) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(recorded / f"{engine.name}.rank{rank}.npz")) for rank in range(size)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ranks_agree_bit_for_bit(kind, engines, recorded):
    first, *others = of_ranks(recorded, engines.make(*kind), kind[0])
    assert first["logits"].shape == (3 * mpi_driver.NEW_TOKENS, SPEC.vocab_size)
    assert first["greedy"].shape == (3, 1, mpi_driver.NEW_TOKENS)
    assert first["beams"].shape == (2, 2, mpi_driver.NEW_TOKENS)
    assert np.array_equal(first["long"][0], first["greedy"][2])
    assert np.array_equal(first["batched"], first["greedy"][:, 0])
    for other in others:
        for name, values in first.items():
            assert np.array_equal(values, other[name]), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ranks_together_are_as_one(kind, engines, recorded, alone):
    size, storage, _ = kind
    found = of_ranks(recorded, engines.make(*kind), size)[0]
    expected = alone[storage]
    bound = FLOAT16_BOUND if storage == "float16" else FLOAT32_BOUND
    assert np.abs(found["logits"] - expected["logits"]).max() <= bound * scale(expected)
    for search in ("greedy", "beams", "long", "batched"):
        assert np.array_equal(found[search], expected[search])


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_the_cores(size, engines, recorded):
    cores = [int(r["cores"]) for r in of_ranks(recorded, engines.make(size, "float32"), size)]
    assert min(cores) >= 1
    assert sum(cores) <= max(size, len(os.sched_getaffinity(0)))


def test_bounds_are_tight_enough_to_tell_storage_types_apart(alone):
    """An engine that ran in a narrower type than it should would not pass."""
    exact = alone["float32"]
    for storage, bound in (("float16", FLOAT32_BOUND), ("bfloat16", FLOAT16_BOUND)):
        assert np.abs(alone[storage]["logits"] - exact["logits"]).max() > bound * scale(exact)


def scale(expected: dict[str, np.ndarray]) -> float:
    return float(np.abs(expected["logits"]).max())


# --- commands ------------------------------------------------------------------------------------


def run_options(engine: Path, hf: Path, *more: object) -> list[object]:
    options = ["--engine_dir", engine, "--tokenizer_dir", hf, "--runtime", "onnxruntime"]
    texts = ["--input_text", "hello", "wo", "abcdefghijklmnopqrstu", "--max_output_len", 5]
    return [*options, *texts, *more]


@pytest.mark.parametrize(("size", "more"), [(2, ["--num_beams=1"]), (4, ["--num_beams=2"])])
def test_run_prints_once_what_one_rank_prints(size, more, engines, tmp_path, capsys):
    csv = tmp_path / "tokens.csv"
    one = run_options(engines.make(1, "float32"), engines.hf, *more)
    if size == 4:  # four rows at most, two beams each
        one.remove("wo")
    call_tool("run.py", *one, f"--output_csv={tmp_path / 'one.csv'}")
    expected = capsys.readouterr().out
    assert expected.count("Input [Text 0]") == 1
    several = [engines.make(size, "float32") if value == one[1] else value for value in one]
    python = sys.executable if size == 2 else None
    script = tool_path("run.py")
    finished = mpirun(size, script, *several, f"--output_csv={csv}", python=python)
    assert finished.status == 0, finished.stderr
    assert finished.stdout == expected
    assert csv.read_text() == (tmp_path / "one.csv").read_text()
    assert finished.stderr.count("Runtime: ONNX Runtime") == 1


def test_smoke_test_of_two_ranks_writes_one_result(engines, tmp_path):
    finished = mpirun(
        2,
        tool_path("smoke_test.py"),
        f"--engine_dir={engines.make(2, 'float32')}",
        f"--model_dir={engines.hf}",
        "--prompt=hello",
        "--max_new_tokens=4",
        f"--output={tmp_path / 'result.json'}",
    )
    assert finished.status == 0, finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ranks"] == 2
    assert result["engines"] == ["rank0.engine", "rank1.engine"]
    assert result["passed"] and result["distance"]["top1"] == 1
    assert result["distance"]["positions"] == len(result["tokens"]) - 1


def test_quality_of_two_ranks_is_that_of_one(engines, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a few windows of some text, for two ranks to read together. ")
    reference = tmp_path / "reference.safetensors"
    call_tool(
        "compute_reference.py",
        *(f"--model_dir={engines.hf}", f"--text={text}", f"--output={reference}"),
        *("--num_windows=3", "--window_length=16"),
    )
    found = {}
    for size in (1, 2):
        output = tmp_path / f"{size}.json"
        arguments = (
            f"--engine_dir={engines.make(size, 'float32')}",
            f"--model_dir={engines.hf}",
            f"--reference={reference}",
            f"--output={output}",
        )
        # A fork's memory includes what it shares.
        script = tool_path("measure_quality.py")
        finished = mpirun(size, script, *arguments, python=sys.executable)
        assert finished.status == 0, finished.stderr
        assert finished.stdout.count("Perplexity") == 1
        found[size] = read_quality(output)
    one, two = found[1].figures, found[2].figures
    assert two.nats_per_token.mean == pytest.approx(one.nats_per_token.mean, abs=1e-6)
    assert two.kl.mean < 1e-9 and two.top1.mean == 1 and two.tokens == 48
    assert found[2].ranks == 2
    # Each rank has its process; both count.
    assert found[2].peak_memory > 1.5 * found[1].peak_memory


@pytest.fixture(scope="module")
def workflow(tmp_path_factory) -> Workflow:
    workflow = Workflow.create(tmp_path_factory.mktemp("workflow") / "work")
    common = {"dtype": "float32", **SMALL}
    workflow.configure(
        fp32={**common, "shard_embedding": False}, sharded={**common, "shard_embedding": True}
    )
    workflow.make(*(f"smoke_tests/toy/{name}/2-gpu.json" for name in ("fp32", "sharded")))
    return workflow


@pytest.mark.parametrize(("variant", "is_sharded"), [("fp32", False), ("sharded", True)])
def test_workflow_makes_and_tests_an_engine_of_two_ranks(variant, is_sharded, workflow):
    result = json.loads((workflow.folder / f"smoke_tests/toy/{variant}/2-gpu.json").read_text())
    assert result["ranks"] == 2 and result["passed"]
    assert result["distance"]["max_abs"] < 1e-4
    assert len(result["tokens"]) == result["prompt_len"] + 6
    engine = workflow.folder / f"trt_engines/toy/{variant}/2-gpu"
    config = json.loads((engine / "config.json").read_text())
    assert config["vocabulary"] == {"embedding": is_sharded, "head": True}
    for rank in (0, 1):
        plan = workflow.folder / f"build/plans/toy/{variant}/2-gpu/rank{rank}.engine"
        assert (engine / f"rank{rank}.engine").samefile(plan)
        assert plan.stat().st_size > 1000


# --- wrong numbers of processes ------------------------------------------------------------------


def require_wrong_number(message: str, ranks: int, processes: int) -> None:
    """Requires the message, whose commands are those of the environment that ran the tool."""
    pattern = (
        f"error: the engine's number of ranks is {ranks}, but the number of processes is "
        rf"{processes}; use (?P<folder>\S+/bin)/mpirun -n {ranks} (?P=folder)/python \.\.\."
    )
    assert re.fullmatch(pattern, message), message


@pytest.mark.parametrize(("ranks", "processes"), [(2, 3), (1, 2)])
def test_wrong_number_of_processes(ranks, processes, engines):
    options = run_options(engines.make(ranks, "float32"), engines.hf)
    finished = mpirun(processes, tool_path("run.py"), *options)
    assert finished.status != 0
    (message,) = finished.errors
    require_wrong_number(message, ranks, processes)
    assert finished.stdout == ""


def test_engine_of_two_ranks_without_mpirun(engines):
    command = [
        sys.executable,
        tool_path("run.py"),
        *run_options(engines.make(2, "float32"), engines.hf),
    ]
    found = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=TIME_LIMIT_S
    )
    require_wrong_number(one_line_error(found), 2, 1)


@pytest.mark.parametrize("patience", ["soon", "0", "nan", "-1"])
def test_patience_that_is_no_number_of_seconds(patience, engines):
    options = run_options(engines.make(2, "float32"), engines.hf)
    finished = mpirun(2, tool_path("run.py"), *options, MPT_TRT_PATIENCE_SECONDS=patience)
    assert finished.status != 0
    assert finished.errors == [
        f"error: MPT_TRT_PATIENCE_SECONDS = {patience!r}: give a number of seconds above 0, or "
        "unset it"
    ]
    assert finished.stdout == ""


# --- ranks that fail -----------------------------------------------------------------------------


@pytest.fixture
def damaged(engines: Engines, tmp_path) -> Path:
    return Path(shutil.copytree(engines.make(2, "float32"), tmp_path / "engine"))


def load_damaged(engines: Engines, damaged: Path) -> list[str]:
    finished = mpirun(2, tool_path("run.py"), *run_options(damaged, engines.hf))
    assert finished.status != 0
    assert finished.stdout == ""
    assert finished.seconds < 60
    return finished.errors


def test_network_of_another_build_is_reported_by_all(engines, damaged, tmp_path):
    """The damaged file has the same size, so only the rank that reads it notices."""
    checkpoint = read_ft_checkpoint(engines.convert(2, "float32"))
    shorter = replace(LIMITS, max_output_len=15)
    make_rank_network(NetworkInputs(checkpoint, shorter, BOTH), Rank(1, 2), tmp_path / "other")
    before = (damaged / "rank1.onnx").stat().st_size
    shutil.copyfile(tmp_path / "other" / "rank1.onnx", damaged / "rank1.onnx")
    assert (damaged / "rank1.onnx").stat().st_size == before
    assert load_damaged(engines, damaged) == [
        f"error: rank 1: {damaged / 'rank1.onnx'}: not the file that config.json describes, but "
        f"damaged or of another build; delete {damaged} and build the engine again"
    ]


def test_missing_file_of_one_rank_is_named(engines, damaged):
    (damaged / "rank1.onnx").unlink()
    errors = load_damaged(engines, damaged)
    message = f"error: {damaged / 'rank1.onnx'}: missing, though config.json names it; delete"
    assert errors and all(line.startswith(message) for line in errors)


def test_different_runtimes_cannot_meet(engines, tmp_path):
    finished = drive(2, "differ", tmp_path, engines.make(2, "float32"))
    assert finished.status != 0
    (error,) = finished.errors
    assert error.startswith("error: the ranks have different runtimes (0: ONNX")
    assert error.endswith(", 1: another); use one for all of them")


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen]:
    """A process that has nothing to do with the ranks, and must live on."""
    process = subprocess.Popen(["sleep", "300"])
    yield process
    process.kill()
    process.wait()


def interrupted(name: str, engines: Engines, folder: Path, **environment: str) -> Finished:
    """Rank 1 of 2 gets a signal in mid-generation."""
    engine = engines.make(2, "float32")
    finished = drive(2, "signal", folder, engine, name, python=sys.executable, **environment)
    assert finished.status != 0
    assert "generated to the end" not in finished.stdout
    assert finished.seconds < 60
    pids = [int((folder / f"pid{rank}").read_text()) for rank in (0, 1)]
    require_ended(pids, within_s=5)
    return finished


def test_rank_that_is_killed_ends_all(engines, bystander, tmp_path):
    finished = interrupted("SIGKILL", engines, tmp_path)
    assert finished.errors == []
    assert "rank 1 with PID" in finished.stderr and "signal 9 (Killed)" in finished.stderr
    assert bystander.poll() is None


def test_rank_that_is_stopped_is_given_up(engines, tmp_path):
    patience = {"MPT_TRT_PATIENCE_SECONDS": str(PATIENCE_S)}
    finished = interrupted("SIGSTOP", engines, tmp_path, **patience)
    assert finished.errors == [
        f"error (rank 0 of 2): timed out after {PATIENCE_S} s waiting for the other ranks: "
        "one has hung or exited (MPT_TRT_PATIENCE_SECONDS sets the limit)"
    ]


def test_rank_that_is_interrupted_ends_all(engines, tmp_path):
    finished = interrupted("SIGTERM", engines, tmp_path)
    assert finished.errors == []
    assert "interrupted; unfinished outputs were removed" in finished.stderr
