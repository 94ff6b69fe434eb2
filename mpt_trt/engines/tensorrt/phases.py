"""Shows the phases of a TensorRT build on stderr, as bars on a terminal or as lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from mpt_trt.system.progress_lines import INTERVAL_SECONDS, in_time, say


class Phases(Protocol):
    """Receiver of TensorRT's reports: phases of the build, and hundreds of parts of a phase."""

    def start(self, name: str, is_outer: bool, num_steps: int) -> None: ...

    def update(self, name: str, completed: int) -> None: ...

    def finish(self, name: str) -> None: ...


@contextmanager
def shown_phases() -> Iterator[Phases]:
    """Yields phases that are shown while they run."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _Bars(progress)


class _Bars:
    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, tuple[TaskID, int]] = {}

    def start(self, name: str, is_outer: bool, num_steps: int) -> None:
        task = self._progress.add_task(name if is_outer else f"  {name}", total=num_steps)
        self._tasks[name] = task, num_steps

    def update(self, name: str, completed: int) -> None:
        self._progress.update(self._tasks[name][0], completed=completed)

    def finish(self, name: str) -> None:
        task, num_steps = self._tasks.pop(name)
        self._progress.update(task, completed=num_steps)
        if self._tasks:  # a part of a phase that goes on
            self._progress.remove_task(task)


class _Lines:
    """Prints a line at the start and end of each outer phase, and every ten seconds."""

    def __init__(self) -> None:
        self._started = self._printed = time.monotonic()
        self._outer: dict[str, str] = {}

    def start(self, name: str, is_outer: bool, num_steps: int) -> None:
        if is_outer:
            self._outer[name] = f"0 of {num_steps}"
            self._print(f"{name}: {num_steps} steps")

    def update(self, name: str, completed: int) -> None:
        if name in self._outer:
            self._outer[name] = f"{completed} of {self._outer[name].split()[-1]}"
        if time.monotonic() - self._printed >= INTERVAL_SECONDS:
            outer = ", ".join(f"{phase}: step {step}" for phase, step in self._outer.items())
            inner = "" if name in self._outer else f" ({name}: {completed})"
            self._print(f"{outer}{inner}, {in_time(self._seconds)}")

    def finish(self, name: str) -> None:
        if self._outer.pop(name, None) is not None:
            self._print(f"{name}: done in {in_time(self._seconds)}")

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        say(line)
