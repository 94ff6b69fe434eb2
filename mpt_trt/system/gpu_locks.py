"""Assigns GPUs to jobs on one machine, so that no two jobs have the same GPU.

A GPU is acquired by binding a Unix socket to a name in the kernel's own ("abstract") name space,
one name per GPU. A name has one owner on the whole machine, across users. There is no shared folder
to agree on, and no file that a cleaner could delete or a crash could leave. The kernel frees the
name when the last process with the socket ends, whatever ended it. The socket passes from the
process that acquired it to the command it becomes and to that command's children, so a GPU stays
acquired exactly as long as a process that may use it lives.

Containers with separate networks have separate name spaces, so give each container its own GPUs.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpus

# Declares the number of GPUs if there is no driver to ask.
DECLARED = "MPT_TRT_GPUS"
# Set for a command that has GPUs, so that its children share these GPUs among themselves.
SCOPE = "MPT_TRT_GPU_SCOPE"
SLURM_JOB = "SLURM_JOB_ID"
PAUSE_SECONDS = 0.1


@dataclass(frozen=True)
class Devices:
    """GPUs that may be acquired: values for CUDA_VISIBLE_DEVICES, and the source of the list."""

    names: tuple[str, ...]
    named_by: str


@dataclass(frozen=True)
class AcquiredGpus:
    """GPUs that this process has acquired, and the sockets that hold them."""

    names: tuple[str, ...]
    sockets: tuple[socket.socket, ...]

    def pass_to_child(self) -> None:
        """Passes the GPUs to the commands that this process becomes or starts."""
        for held in self.sockets:
            held.set_inheritable(True)

    def release(self) -> None:
        """Frees the GPUs, unless a child process also has them."""
        for held in self.sockets:
            held.close()


def devices() -> Devices:
    """GPUs of this machine, or those of them that a scheduler or user allows.

    CUDA_VISIBLE_DEVICES has precedence, then the driver, then the number in MPT_TRT_GPUS. The
    latter is ignored in SLURM's jobs, because it would override SLURM's assignment.

    Raises MptTrtError when MPT_TRT_GPUS is not a number.
    """
    if identifiers := gpus.identifiers():
        return Devices(
            identifiers, gpus.VISIBLE if gpus.visible() is not None else "from the driver"
        )
    if (visible := gpus.visible()) is not None:
        return Devices(visible, gpus.VISIBLE)
    if DECLARED in os.environ and SLURM_JOB not in os.environ:
        return Devices(tuple(map(str, range(_declared()))), DECLARED)
    return Devices((), "no NVIDIA driver found")


def scope() -> str:
    """The scope of GPU names: this machine, a SLURM job, or a job of this workflow.

    SLURM may number each job's GPUs from 0, and separates jobs itself.
    """
    if SCOPE in os.environ:
        return os.environ[SCOPE]
    return f"slurm-{os.environ[SLURM_JOB]}" if SLURM_JOB in os.environ else "machine"


def require(count: int, available: Devices) -> None:
    """Raises MptTrtError when there are fewer than `count` GPUs."""
    if count > len(available.names):
        raise MptTrtError(
            f"{count} GPUs are needed, but there are {len(available.names)} "
            f"({available.named_by}); use fewer ranks, or a machine with enough GPUs"
        )


def acquire(
    count: int,
    available: Devices,
    within: str,
    on_wait: Callable[[], None] = lambda: None,
) -> AcquiredGpus:
    """Acquires `count` GPUs. If they are not free, calls `on_wait` once and waits.

    Only one process of a scope collects GPUs at a time. So processes never wait for each other in a
    circle, and small jobs cannot starve a job that needs many GPUs.

    Raises MptTrtError, without waiting, when there are fewer than `count`.
    """
    require(count, available)
    if count == 0:
        return AcquiredGpus((), ())
    wait = _Wait(on_wait)
    while (gate := _bind(f"{within}/gate")) is None:
        wait()
    with gate:
        held: dict[str, socket.socket] = {}
        while True:
            for name in available.names:
                if name not in held and len(held) < count:
                    lock = _bind(f"{within}/{name}")
                    if lock is not None:
                        held[name] = lock
            if len(held) == count:
                break
            wait()
    names = tuple(name for name in available.names if name in held)
    return AcquiredGpus(names, tuple(held.values()))


def environment(names: Sequence[str]) -> dict[str, str]:
    """Environment variables for a command that may use only these GPUs."""
    return {gpus.VISIBLE: ",".join(names), SCOPE: f"within-{os.getpid()}"}


class _Wait:
    """Pauses; the first time, it also calls `on_wait`."""

    def __init__(self, on_wait: Callable[[], None]):
        self._on_wait = on_wait
        self._is_new = True

    def __call__(self) -> None:
        if self._is_new:
            self._is_new = False
            self._on_wait()
        time.sleep(PAUSE_SECONDS)


def _bind(name: str) -> socket.socket | None:
    """Binds a socket to the name; None when another process has it."""
    own = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        own.bind(f"\0mpt-trt/{name}")
    except OSError as error:
        own.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return own


def _declared() -> int:
    text = os.environ[DECLARED]
    if not text.isdecimal():
        raise MptTrtError(f"{DECLARED} = {text!r}: give the number of GPUs of this machine")
    return int(text)
