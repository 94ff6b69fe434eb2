"""What the command-line tools share: running a main function, progress on stderr."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mpt_trt.errors import MptTrtError, SharedError
from mpt_trt.system import mpi
from mpt_trt.system.process import wait_without_spinning

if TYPE_CHECKING:
    from rich.progress import Progress

INTERRUPTED = 128 + signal.SIGINT


def run_cli(main: Callable[[], None]) -> None:
    """Runs `main` and exits: 0, 1 with one line for bad input, 130 when interrupted.

    SIGTERM is treated like Ctrl-C, so that unfinished outputs are removed in both cases.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wait_without_spinning()
    try:
        main()
    except SharedError as error:
        # No rank needs to be ended by another: they all come here, and meet in MPI's finalization.
        if not mpi.is_another_rank():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (MptTrtError, FloatingPointError) as error:
        print(f"error{mpi.rank_label()}: {error}", file=sys.stderr)
        mpi.end_all_ranks(1)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted; unfinished outputs were removed", file=sys.stderr)
        mpi.end_all_ranks(INTERRUPTED)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of our output (head, say) has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception:
        if mpi.rank_label():
            traceback.print_exc()
            mpi.end_all_ranks(1)
        raise
    # Python looks for garbage once more when it ends, among everything that was imported: 0.03 s.
    gc.freeze()


def set_up_logging(level: str) -> None:
    """Logs to stderr. level: a name of the logging module, in any case.

    Raises MptTrtError when there is no such level.
    """
    if level.upper() not in logging.getLevelNamesMapping():
        raise MptTrtError(f"log level {level!r}: known are debug, info, warning, error, critical")
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, markup=False)
    logging.basicConfig(level=level.upper(), format="%(message)s", handlers=[handler], force=True)
    # The hub's client reports every request, and what it logs itself it also prints.
    logging.getLogger("huggingface_hub").propagate = False
    logging.getLogger("httpx").setLevel(logging.WARNING)


@contextlib.contextmanager
def bytes_progress(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with bytes, rate and time; yields the function that advances it.

    The bar is there from the first step on; then what draws it is imported by one thread, while
    others work. Where no terminal can show it, there is one line at the end.
    """
    if sys.stderr.isatty():
        bar = _LazyBar(lambda: _bytes_bar(title, total_bytes))
    else:
        bar = _Line(title, total_bytes)
    try:
        yield bar.advance
    finally:
        bar.stop()


class _Line:
    """What has been done, as one line: without what draws bars, whose import takes 0.05 s."""

    def __init__(self, title: str, total_bytes: int):
        self._title, self._total = title, total_bytes
        self._done = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count

    def stop(self) -> None:
        # Never 0, by which the rate is divided.
        seconds = max(time.monotonic() - self._started, 1e-9)
        done, total, rate = map(_in_units, (self._done, self._total, self._done / seconds))
        print(f"{self._title}: {done} of {total} in {seconds:.1f} s, {rate}/s", file=sys.stderr)


def _in_units(size: float) -> str:
    units = ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}"


class _LazyBar:
    """A progress bar that is made when it advances first."""

    def __init__(self, start: Callable[[], Progress]):
        self._start = start
        self._progress: Progress | None = None
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            if self._progress is None:
                self._progress = self._start()
        (task,) = self._progress.task_ids
        self._progress.advance(task, count)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def _bytes_bar(title: str, total_bytes: int) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

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
    """A progress bar with steps, elapsed and remaining time; yields what advances it by one."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

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
