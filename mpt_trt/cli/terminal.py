"""What Rich writes to stderr: log messages and progress bars."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mpt_trt.errors import MptTrtError


def set_up_logging(level: str) -> None:
    """Log to stderr. level: a name of the logging module, in any case.

    Raises MptTrtError when there is no such level.
    """
    if level.upper() not in logging.getLevelNamesMapping():
        raise MptTrtError(f"log level {level!r}: known are debug, info, warning, error, critical")
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, markup=False)
    logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler], force=True)
    # The hub's client reports every request, and what it logs itself it also prints.
    logging.getLogger("huggingface_hub").propagate = False
    logging.getLogger("httpx").setLevel(logging.WARNING)


def bytes_bar(title: str, total_bytes: int) -> Progress:
    """Started progress bar with bytes, rate and time."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    progress.add_task(title, total=total_bytes)
    progress.start()
    return progress


@contextlib.contextmanager
def steps_progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Progress bar with steps and times; yields the function that advances it by one step."""
    console = Console(stderr=True)
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    # Steps may take minutes: the estimate looks back further than usual.
    with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
