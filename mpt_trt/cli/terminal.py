"""Log messages and progress bars on stderr, drawn by Rich."""

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
    """Log to stderr. level: a level name of the logging module, in any case.

    Raises MptTrtError for an unknown level.
    """
    if level.upper() not in logging.getLevelNamesMapping():
        raise MptTrtError(f"log level {level!r}: known are debug, info, warning, error, critical")
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, markup=False)
    logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler], force=True)
    # The hub's client logs every request, and also prints its own messages.
    logging.getLogger("huggingface_hub").propagate = False
    logging.getLogger("httpx").setLevel(logging.WARNING)


def bytes_bar(title: str, total_bytes: int) -> Progress:
    """Start a progress bar with bytes, rate and time."""
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
    """Start a progress bar with steps and times."""
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    # Steps may take minutes, so the estimate covers a longer period than usual.
    progress = Progress(*columns, console=Console(stderr=True), speed_estimate_period=3600)
    progress.add_task(title, total=total)
    progress.start()
    return progress
