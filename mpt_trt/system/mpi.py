"""The ranks of a tensor-parallel engine as MPI processes.

Importing this module does not start MPI; `communicator` does, when there is more than one rank.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_trt.errors import MptTrtError, SharedError
from mpt_trt.system.process import end_with_parent
from mpt_trt.system.shown_paths import seen_from

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray

# Set by the launchers of Open MPI, of PMIx (srun --mpi=pmix) and of MPICH.
LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK")
# Variable with the patience of ranks.
PATIENCE = "MPT_TRT_PATIENCE_SECONDS"
DEFAULT_PATIENCE_SECONDS = 300.0
# Time of polling without a pause, since ranks mostly meet within microseconds.
EAGER_SECONDS = 0.002
PAUSE_SECONDS = 0.0002


class Communicator:
    """Communication between the ranks of an engine, over MPI; all ranks call together.

    patience_seconds: how long a rank waits for the others before it considers them dead.
    """

    def __init__(self, world: Any, patience_seconds: float):
        self._world = world
        self.patience_seconds = patience_seconds
        self._is_interrupted = False
        self.rank: int = world.rank
        self.size: int = world.size

    def all_reduce(self, value: NDArray[np.float32]) -> NDArray[np.float32]:
        """Adds the ranks' arrays in the order of ranks, so that every rank gets the same bits."""
        gathered = self._gathered(value)
        total = gathered[0].copy()
        for other in gathered[1:]:
            total += other
        return total

    def all_gather(self, value: NDArray[np.float32]) -> NDArray[np.float32]:
        """Joins the ranks' arrays, which have the same shape, along axis 0."""
        return self._gathered(value).reshape(self.size * len(value), *value.shape[1:])

    def exchange(self, value: object) -> list[Any]:
        """Collects every rank's value, in the order of ranks; meant for small values."""
        # Every tool imports this module, also for --help, and few communicate.
        import numpy as np

        own = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = self._gathered(np.array([own.size])).ravel()
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: own.size] = own
        rows = zip(self._gathered(padded), sizes, strict=True)
        return [pickle.loads(row[:size].tobytes()) for row, size in rows]

    def num_cores(self) -> int:
        """Number of this rank's cores: its equal share of the cores that its launcher allows."""
        own = os.uname().nodename, frozenset(os.sched_getaffinity(0))
        return max(1, len(own[1]) // self.exchange(own).count(own))

    def agree(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on every rank; if it fails on one, raises SharedError on all."""
        result, complaint = None, None
        try:
            result = action()
        except MptTrtError as error:
            complaint = str(error)
        for rank, other_complaint in enumerate(self.exchange(complaint)):
            if other_complaint is not None:
                raise SharedError(f"rank {rank}: {other_complaint}")
        return result

    @contextmanager
    def deferred_interrupts(self) -> Iterator[None]:
        """Delays the KeyboardInterrupt of Ctrl-C and SIGTERM until ranks meet, or to the end."""
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # Other handlers do not raise, and no handler runs outside of the main thread.
        is_main = threading.current_thread() is threading.main_thread()
        raising = [n for n in previous if is_main and previous[n] is signal.default_int_handler]
        for number in raising:
            signal.signal(number, self._interrupt)
        try:
            yield
        finally:
            for number in raising:
                signal.signal(number, previous[number])
        self._raise_if_interrupted()

    def _interrupt(self, *_: object) -> None:
        self._is_interrupted = True

    def _raise_if_interrupted(self) -> None:
        if self._is_interrupted:
            self._is_interrupted = False
            raise KeyboardInterrupt

    def _gathered(self, value: NDArray) -> NDArray:
        import numpy as np  # as above

        own = np.ascontiguousarray(value)
        gathered = np.empty((self.size, *own.shape), own.dtype)
        self._wait(self._world.Iallgather(own, gathered))
        return gathered

    def _wait(self, request: Any) -> None:
        started = time.monotonic()
        while not request.Test():
            self._raise_if_interrupted()
            waited = time.monotonic() - started
            if waited > self.patience_seconds:
                raise timed_out(self.patience_seconds)
            if waited > EAGER_SECONDS:
                time.sleep(PAUSE_SECONDS)


def timed_out(seconds: float) -> MptTrtError:
    """Makes the error of a rank that has waited too long for the others."""
    return MptTrtError(
        f"timed out after {seconds:g} s waiting for the other ranks: one has hung or exited "
        f"({PATIENCE} sets the limit)"
    )


def communicator(tp_size: int) -> Communicator | None:
    """Makes the communicator of an engine of tp_size ranks; None for a single rank.

    Raises SharedError when another number of processes was started, or when
    MPT_TRT_PATIENCE_SECONDS is not a number of seconds.
    """
    is_launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
    if tp_size == 1 and not is_launched:
        return None
    _end_with_mpirun()
    # Importing it starts MPI.
    from mpi4py import MPI

    size = MPI.COMM_WORLD.size
    if size != tp_size:
        raise SharedError(
            f"the engine's number of ranks is {tp_size}, but the number of processes is {size}; "
            f"use {_own_program('mpirun')} -n {tp_size} {_own_program('python')} ..."
        )
    return None if size == 1 else Communicator(MPI.COMM_WORLD, _patience_seconds())


def _own_program(name: str) -> str:
    """Path of a program next to this Python, from the working directory; its name if there is none.

    Packages from PyPI install mpirun there, where a shell need not look for it.
    """
    program = Path(sys.executable).with_name(name)
    return seen_from(Path.cwd(), program) if program.exists() else name


def _patience_seconds() -> float:
    text = os.environ.get(PATIENCE, str(DEFAULT_PATIENCE_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not seconds > 0:
        raise SharedError(f"{PATIENCE} = {text!r}: give a number of seconds above 0, or unset it")
    return seconds


def _end_with_mpirun() -> None:
    """Makes Linux end this rank when Open MPI's mpirun is killed; otherwise it would keep running.

    SLURM cleans up after its jobs itself.
    """
    if LAUNCHER_VARIABLES[0] in os.environ:
        end_with_parent()


def rank_label() -> str:
    """Label for messages: ` (rank 1 of 4)` if MPI runs several ranks, else empty."""
    world = _running_world()
    return "" if world is None else f" (rank {world.rank} of {world.size})"


def is_another_rank() -> bool:
    """Returns whether this is a rank other than 0 of several."""
    world = _running_world()
    return world is not None and world.rank > 0


def end_all_ranks(status: int) -> None:
    """Ends all ranks, because the others would wait for this one; does nothing without MPI."""
    world = _running_world()
    if world is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        world.Abort(status)


def _running_world() -> Any:
    """Returns MPI's world communicator if this process is one of several ranks, else None."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or mpi.Is_finalized() or mpi.COMM_WORLD.size == 1:
        return None
    return mpi.COMM_WORLD
