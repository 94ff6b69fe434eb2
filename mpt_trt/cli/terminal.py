"""Progress bars on stderr, drawn by Rich."""

from __future__ import annotations

from rich.console import Console
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
