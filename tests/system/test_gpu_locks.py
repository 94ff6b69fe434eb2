"""Assignment of GPUs to jobs of one machine: distinct, all or none, freed whenever a job ends."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpu_locks, gpus
from mpt_trt.system.gpu_locks import Devices
from support.workflow import REPOSITORY

FOUR = Devices(("0", "1", "2", "3"), "a test")
WRAPPER = REPOSITORY / "workflow_scripts/steps/with_gpus.py"
JOB = """
import json, os, sys, time
print(os.environ["CUDA_VISIBLE_DEVICES"], time.monotonic(), flush=True)
time.sleep(float(sys.argv[1]))
print(time.monotonic(), flush=True)
"""
_numbers = itertools.count()


@pytest.fixture
def scope() -> str:
    """A name space of the test's own: others may run at the same time."""
    return f"test-{os.getpid()}-{next(_numbers)}"


def start(scope: str, count: int, *command: str, declared: int = 4) -> subprocess.Popen[str]:
    environment = {
        name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"
    }
    declared_gpus = {gpu_locks.DECLARED: str(declared), gpu_locks.SCOPE: scope}
    return subprocess.Popen(
        [sys.executable, WRAPPER, f"--gpus={count}", "--", *command],
        env=environment | declared_gpus,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_job(scope: str, count: int, seconds: float) -> subprocess.Popen[str]:
    return start(scope, count, sys.executable, "-c", JOB, str(seconds))


def free(scope: str) -> set[str]:
    """Returns the GPUs of four that are free right now."""
    found = set()
    for name in FOUR.names:
        if (taken := gpu_locks._bind(f"{scope}/{name}")) is not None:
            found.add(name)
            taken.close()
    return found


def wait_for_free(scope: str, names: set[str]) -> None:
    deadline = time.monotonic() + 20
    while not names <= free(scope):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- taking --------------------------------------------------------------------------------------


def test_takes_are_distinct_until_released(scope: str) -> None:
    first = gpu_locks.acquire(2, FOUR, scope)
    second = gpu_locks.acquire(2, FOUR, scope)
    assert set(first.names) | set(second.names) == set(FOUR.names)
    first.release()
    assert gpu_locks.acquire(1, FOUR, scope).names == first.names[:1]
    second.release()


def test_other_scopes_are_other_gpus(scope: str) -> None:
    held = gpu_locks.acquire(4, FOUR, scope)
    other = gpu_locks.acquire(4, FOUR, f"{scope}-other")
    assert other.names == FOUR.names
    held.release()
    other.release()


def test_more_than_there_are_is_refused_at_once(scope: str) -> None:
    held = gpu_locks.acquire(4, FOUR, scope)
    with pytest.raises(MptTrtError, match=r"5 GPUs are needed, but there are 4 \(a test\)"):
        gpu_locks.acquire(5, FOUR, scope)
    held.release()


def test_none_are_always_there(scope: str) -> None:
    assert gpu_locks.acquire(0, Devices((), "nobody"), scope).names == ()


# --- available GPUs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        (None, None),
        ("", ()),
        ("0,2", ("0", "2")),
        (" 1 , 0", ("1", "0")),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("1,-1,2", ("1",)),
        ("GPU-8932f937-d72c,MIG-1/2/3", ("GPU-8932f937-d72c", "MIG-1/2/3")),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(
    monkeypatch: pytest.MonkeyPatch, text: str | None, entries: tuple[str, ...] | None
) -> None:
    if text is None:
        monkeypatch.delenv(gpus.VISIBLE, raising=False)
    else:
        monkeypatch.setenv(gpus.VISIBLE, text)
    assert gpus.visible() == entries


@pytest.mark.skipif(bool(gpus.identifiers()), reason="a driver knows better")
def test_assigned_gpus_come_before_declared_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu_locks.DECLARED, "3")
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.delenv(gpu_locks.SLURM_JOB, raising=False)
    assert gpu_locks.devices().names == ("0", "1", "2")
    monkeypatch.setenv(gpus.VISIBLE, "5,7")
    assert gpu_locks.devices() == Devices(("5", "7"), gpus.VISIBLE)


@pytest.mark.skipif(bool(gpus.identifiers()), reason="a driver knows better")
def test_in_a_slurm_job_only_slurm_assigns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu_locks.DECLARED, "3")
    monkeypatch.setenv(gpu_locks.SLURM_JOB, "17")
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.delenv(gpu_locks.SCOPE, raising=False)
    assert gpu_locks.devices().names == ()
    assert gpu_locks.scope() == "slurm-17"


def test_a_declaration_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu_locks.DECLARED, "two")
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.delenv(gpu_locks.SLURM_JOB, raising=False)
    if not gpus.identifiers():
        with pytest.raises(MptTrtError, match=r"MPT_TRT_GPUS = 'two'"):
            gpu_locks.devices()


# --- the command ---------------------------------------------------------------------------------


def test_the_command_sees_its_gpus_and_its_status_comes_back(scope: str) -> None:
    process = start(scope, 2, "sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exit 3")
    output, _ = process.communicate(timeout=30)
    assert (output, process.returncode) == ("0,1\n", 3)


def test_no_gpus_hides_all(scope: str) -> None:
    process = start(scope, 0, "sh", "-c", 'echo "[$CUDA_VISIBLE_DEVICES]"')
    assert process.communicate(timeout=30)[0] == "[]\n"


def test_too_many_are_refused_in_one_line(scope: str) -> None:
    process = start(scope, 3, "true", declared=2)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 1
    assert complaint.startswith("error: 3 GPUs are needed, but there are 2 (MPT_TRT_GPUS)")
    assert complaint.count("\n") == 1


def test_an_unknown_command_is_named(scope: str) -> None:
    process = start(scope, 1, "no-such-command")
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: no-such-command: cannot be run: No such file or directory" in complaint
    assert free(scope) == set(FOUR.names)


def test_a_pipe_that_closes_ends_the_command_as_usual(scope: str) -> None:
    process = start(scope, 0, "yes")
    process.stdout.close()
    assert process.wait(30) == -signal.SIGPIPE


def test_commands_inside_share_what_the_outer_one_has(scope: str) -> None:
    inner = f"{sys.executable} {WRAPPER} --gpus=1 -- sh -c 'echo $CUDA_VISIBLE_DEVICES; sleep 0.5'"
    process = start(scope, 2, "sh", "-c", f"{inner} & {inner} & wait")
    output, _ = process.communicate(timeout=60)
    assert sorted(output.split()) == ["0", "1"]
    too_many = start(scope, 2, sys.executable, str(WRAPPER), "--gpus=3", "--", "true")
    assert "there are 2" in too_many.communicate(timeout=30)[1]


def test_many_jobs_at_once_never_share_a_gpu(scope: str) -> None:
    """Jobs of one to four GPUs, most of which must wait; all run, and no two share a GPU."""
    draw = random.Random(7)
    counts = [4, 3, 3, 2, 2, 1, 1, 1]
    draw.shuffle(counts)
    processes = [start_job(scope, count, draw.uniform(0.05, 0.2)) for count in counts]
    spans: dict[str, list[tuple[float, float]]] = {}
    for count, process in zip(counts, processes, strict=True):
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        names, began, ended = output.split()
        assert len(set(names.split(","))) == count
        for name in names.split(","):
            spans.setdefault(name, []).append((float(began), float(ended)))
    for uses in spans.values():
        uses.sort()
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(uses))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSEGV])
def test_any_death_gives_the_gpus_back(scope: str, number: signal.Signals) -> None:
    process = start_job(scope, 3, 60)
    assert process.stdout.readline()
    assert free(scope) == {"3"}
    waiting = start_job(scope, 2, 0)
    process.send_signal(number)
    assert process.wait(10) != 0
    assert waiting.communicate(timeout=30)[0]
    wait_for_free(scope, set(FOUR.names))


def test_a_killed_waiter_lets_the_next_one_collect(scope: str) -> None:
    holder = start_job(scope, 3, 60)
    assert holder.stdout.readline()
    greedy = start_job(scope, 4, 0)  # takes the last one, and waits
    while free(scope):
        time.sleep(0.02)
    greedy.kill()
    modest = start_job(scope, 1, 0)
    assert modest.communicate(timeout=30)[0].startswith("3 ")
    holder.kill()
    assert greedy.wait(10) == -signal.SIGKILL


def test_what_a_killed_job_leaves_behind_keeps_its_gpus(scope: str) -> None:
    """The GPU is still in use, so it is not given to another."""
    process = start(scope, 2, "sh", "-c", "sleep 60 & echo $!; wait")
    child = int(process.stdout.readline())
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    assert free(scope) == {"2", "3"}
    os.kill(child, signal.SIGKILL)
    wait_for_free(scope, set(FOUR.names))


RANK = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from mpt_trt.system.mpi import communicator
communicator(2)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_ranks_end_with_a_killed_mpirun(scope: str) -> None:
    mpirun = Path(sys.executable).with_name("mpirun")
    ranks = [sys.executable, "-c", RANK, str(REPOSITORY)]
    options = ["-n", "2", "--allow-run-as-root", "--oversubscribe"]
    process = start(scope, 2, str(mpirun), *options, *ranks)
    found = [int(process.stdout.readline()) for _ in range(2)]
    assert free(scope) == {"2", "3"}
    for path in Path("/proc").glob("[0-9]*/stat"):
        # mpirun's own process is the ranks' parent.
        if path.parent.name == str(found[0]):
            parent = int(re.sub(r"^.*\) \S ", "", path.read_text()).split()[0])
    os.kill(parent, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(Path("/proc", str(rank), "exe").exists() for rank in found):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    wait_for_free(scope, set(FOUR.names))
