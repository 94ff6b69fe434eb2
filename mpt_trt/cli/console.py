"""Running a command: its options, then its module, then its exit code."""

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
from collections.abc import Callable

from mpt_trt.cli.standard_streams import flush_standard_output, prepare_standard_streams
from mpt_trt.errors import MptTrtError, SharedError
from mpt_trt.system import mpi
from mpt_trt.system.process import wait_without_spinning

INTERRUPTED = 128 + signal.SIGINT
REMEDY = "free memory, raise the limit (ulimit -v, SLURM's --mem), or use fewer processes"
# What PyTorch and Python's threads say, who have no exception of their own for it.
MEMORY_MESSAGES = ("can't allocate memory", "can't start new thread", "std::bad_alloc")


def run_command(parser: argparse.ArgumentParser, command: str) -> None:
    """Parse the options, then import the module `command` and call its `run(options)`.

    So modules of commands import at their top whatever they need, and `--help` and wrong options do
    not wait for it. Exits as `run_cli` does.
    """

    def main() -> None:
        options = parser.parse_args()
        importlib.import_module(command).run(options)

    run_cli(main)


def run_cli(main: Callable[[], None]) -> None:
    """Run `main` and exit: 0, 1 with one line for bad input or no memory, 130 when interrupted.

    Output that the standard output does not take (a full disk, a closed pipe) is such an error.

    SIGTERM is treated like Ctrl-C, so that unfinished outputs are removed in both cases.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wait_without_spinning()
    prepare_standard_streams()
    try:
        _run_and_flush(main)
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
    except Exception as error:
        if (message := _plain_message(error)) is not None:
            print(f"error{mpi.rank_label()}: {message}", file=sys.stderr)
            mpi.end_all_ranks(1)
            raise SystemExit(1) from None
        if mpi.rank_label():
            traceback.print_exc()
            mpi.end_all_ranks(1)
        raise
    # Python looks for garbage once more when it ends, among everything that was imported: 0.03 s.
    gc.freeze()


def _run_and_flush(main: Callable[[], None]) -> None:
    try:
        main()
    except SystemExit:  # by --help
        flush_standard_output()
        raise
    except BaseException:
        with contextlib.suppress(MptTrtError, OSError):
            flush_standard_output()
        raise
    flush_standard_output()


def _plain_message(error: Exception) -> str | None:
    """One line about an error that says nothing about our code; None for others."""
    if _is_out_of_memory(error):
        return f"out of memory ({error}); {REMEDY}"
    if isinstance(error, BrokenPipeError):
        return "the reader of an output has ended; read all of it"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return None


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(what in str(error) for what in MEMORY_MESSAGES)
