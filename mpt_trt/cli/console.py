"""Running a command: its options, then its module, then its exit code."""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable

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
    except Exception as error:
        if _is_out_of_memory(error):
            print(f"error{mpi.rank_label()}: out of memory ({error}); {REMEDY}", file=sys.stderr)
            mpi.end_all_ranks(1)
            raise SystemExit(1) from None
        if mpi.rank_label():
            traceback.print_exc()
            mpi.end_all_ranks(1)
        raise
    # Python looks for garbage once more when it ends, among everything that was imported: 0.03 s.
    gc.freeze()


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(what in str(error) for what in MEMORY_MESSAGES)
