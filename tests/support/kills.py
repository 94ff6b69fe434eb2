"""Workflows that are stopped on their way, and what they have made in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.workflow import Workflow

ARTIFACTS = ("ft_ckpts", "build", "trt_engines", "smoke_tests")


LONGEST_SECONDS = 300
# --nolock: not to wait for `snakemake --unlock` after each kill.
COMMAND = (sys.executable, "-m", "snakemake", "--cores=2", "--rerun-incomplete", "--nolock")


class StoppedWorkflow:
    """A run of a workflow that is going to be stopped, with all of its jobs."""

    def __init__(self, workflow: Workflow, target: str):
        self._log = workflow.folder / "stopped.log"
        with self._log.open("w") as stream:
            self._process = subprocess.Popen(
                [*COMMAND, target],
                cwd=workflow.folder,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def wait_for(self, text: str) -> None:
        """Waits until a text is in the run's output, or the run has ended."""
        self.wait_until(lambda: text in self._log.read_text())

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Waits until something has happened, or the run has ended."""
        end = time.monotonic() + LONGEST_SECONDS
        while not happened() and self._process.poll() is None:
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.02)

    def stop(self, number: signal.Signals) -> bool:
        """Sends a signal to all processes of the run; returns whether it was still under way."""
        is_running = self._process.poll() is None
        if is_running:
            os.killpg(self._process.pid, number)
        return self._process.wait(LONGEST_SECONDS) != 0 and is_running


def finish(workflow: Workflow, target: str) -> None:
    """Makes the target after a kill, as docs/security.md describes."""
    for arguments in (("--unlock",), ("--rerun-incomplete",)):
        ended = workflow.run(*arguments, target)
        assert ended.returncode == 0, ended.stdout + ended.stderr


def artifacts(workflow: Workflow) -> dict[str, object]:
    """The content of all that the workflow made, without what differs from build to build.

    That is the content of plans, speeds, and the place of the working directory.
    """
    found: dict[str, object] = {}
    for top in ARTIFACTS:
        for path in sorted((workflow.folder / top).rglob("*")):
            if path.is_file() and path.name != ".snakemake_timestamp":
                found[str(path.relative_to(workflow.folder))] = _content(path, workflow.folder)
            else:
                assert not path.is_symlink() and ".partial-" not in path.name, path
    return found


def _content(path: Path, folder: Path) -> object:
    if path.suffix == ".engine":
        return "a plan"
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    return _comparable(json.loads(content.replace(str(folder).encode(), b"")))


def _comparable(content: object) -> object:
    if isinstance(content, list):
        return list(map(_comparable, content))
    if not isinstance(content, dict):
        return content
    differing = {"speed", "rank0.engine"}
    return {key: _comparable(value) for key, value in content.items() if key not in differing}
