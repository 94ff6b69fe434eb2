"""Runs a command: parses its options, imports its module, sets the exit code."""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from mpt_trt.cli.standard_streams import STDERR, flush_standard_output, prepare_standard_streams
from mpt_trt.errors import MptTrtError, SharedError
from mpt_trt.system import mpi
from mpt_trt.system.process import wait_without_spinning

INTERRUPTED = 128 + signal.SIGINT
INTERRUPTED_MESSAGE = "interrupted; unfinished outputs were removed"
REMEDY = "free memory, raise the limit (ulimit -v, SLURM's --mem), or use fewer processes"
INSTALLATION = (
    "start the tool with the Python of an environment that has mpt-trt's requirements "
    "(.venv/bin/python after make), or install them with pip install -r requirements.txt"
)
# Messages of PyTorch and Python's threads, which have no exception type for a lack of memory.
MEMORY_MESSAGES = ("can't allocate memory", "can't start new thread", "std::bad_alloc")


def run_command(make_parser: Callable[[], argparse.ArgumentParser], command: str) -> None:
    """Parse the options, then import the module `command` and call its `run(options)`.

    So `--help` and wrong options do not wait for the imports of the command's module. Exits like
    `run_cli`.
    """

    def main() -> None:
        options = make_parser().parse_args()
        with _interrupts_end_at_once():
            module = importlib.import_module(command)
        module.run(options)

    run_cli(main)


def run_cli(main: Callable[[], None]) -> None:
    """Run `main` and exit: 0, 1 with one line for bad input or no memory, 130 when interrupted.

    Failed writes to the standard output (a full disk, a closed pipe) are such errors.

    SIGTERM is treated like Ctrl-C, and so is a closed terminal (SIGHUP, unless nohup ignores it),
    so that unfinished outputs are removed in all cases.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        # What delays or handles SIGTERM later then holds for both.
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    wait_without_spinning()
    prepare_standard_streams()
    try:
        _run_and_flush(main)
    except SharedError as error:
        # All ranks get here and meet in MPI's finalization, so none needs to end the others.
        if not mpi.is_another_rank():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (MptTrtError, FloatingPointError) as error:
        print(f"error{mpi.rank_label()}: {error}", file=sys.stderr)
        mpi.end_all_ranks(1)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(INTERRUPTED_MESSAGE, file=sys.stderr)
        mpi.end_all_ranks(INTERRUPTED)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if (message := _plain_message(error)) is not None:
            print(f"error{mpi.rank_label()}: {message}", file=sys.stderr)
            mpi.end_all_ranks(1)
            raise SystemExit(1) from None
        if mpi.rank_label():
            traceback.print_exc()
            mpi.end_all_ranks(1)
        raise
    # Skips Python's final garbage collection over everything that was imported (0.03 s).
    gc.freeze()


@contextlib.contextmanager
def _interrupts_end_at_once() -> Iterator[None]:
    """Ends the process at Ctrl-C and SIGTERM while modules are imported and nothing is written.

    An exception would surface in the initialization of compiled modules, which report it as an
    ImportError, or crash.
    """

    def end(*_: object) -> None:
        with contextlib.suppress(OSError):
            os.write(STDERR, f"{INTERRUPTED_MESSAGE}\n".encode())
        os._exit(INTERRUPTED)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler == signal.default_int_handler:  # the shell lets background jobs ignore Ctrl-C
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_and_flush(main: Callable[[], None]) -> None:
    try:
        _require_current_directory()
        main()
    except SystemExit:  # raised by --help
        flush_standard_output()
        raise
    except BaseException:
        with contextlib.suppress(MptTrtError, OSError):
            flush_standard_output()
        raise
    flush_standard_output()


def _require_current_directory() -> None:
    """Raises MptTrtError if the current directory was deleted, since libraries need one."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise MptTrtError(
            "the current directory was deleted; change to one that exists (cd), and run again"
        ) from None


def _plain_message(error: Exception) -> str | None:
    """Message for errors that are not bugs of mpt-trt, in one line; None for others."""
    if _is_out_of_memory(error):
        return f"out of memory ({error}); {REMEDY}"
    if isinstance(error, BrokenPipeError):
        return "the reader of an output has ended; read all of it"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        if package != "mpt_trt":
            return f"{sys.executable} has no package {package}; {INSTALLATION}"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(what in str(error) for what in MEMORY_MESSAGES)
