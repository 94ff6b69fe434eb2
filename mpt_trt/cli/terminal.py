"""What Rich writes to stderr: log messages and progress bars."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
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


def steps_bar(title: str, total: int) -> Progress:
    """Started progress bar with steps and times."""
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    # Steps may take minutes: the estimate looks back further than usual.
    progress = Progress(*columns, console=Console(stderr=True), speed_estimate_period=3600)
    progress.add_task(title, total=total)
    progress.start()
    return progress
