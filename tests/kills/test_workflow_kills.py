"""The whole workflow, killed at 20 points from clean trees, always ends with the same artifacts."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.kills import StoppedWorkflow, artifacts, finish
from support.workflow import Workflow

pytestmark = pytest.mark.kills
TARGET = "smoke_tests/toy/fp16/1-gpu.json"
POINTS = 20


@dataclass(frozen=True)
class Undisturbed:
    seconds: float
    artifacts: dict[str, object]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    workflow = Workflow.create(tmp_path_factory.mktemp("undisturbed") / "project")
    started = time.monotonic()
    workflow.make(TARGET)
    return Undisturbed(time.monotonic() - started, artifacts(workflow))


@pytest.mark.parametrize("point", range(POINTS))
def test_killed_at_a_random_moment(point: int, undisturbed: Undisturbed, tmp_path: Path) -> None:
    workflow = Workflow.create(tmp_path / "project")
    moment = (point + random.random()) / POINTS * undisturbed.seconds
    run = StoppedWorkflow(workflow, TARGET)
    time.sleep(moment)
    run.stop(signal.SIGKILL)
    finish(workflow, TARGET)
    assert artifacts(workflow) == undisturbed.artifacts, f"killed after {moment:.2f} s"
    assert workflow.planned(TARGET) == []
