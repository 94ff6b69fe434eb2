"""Run a command with GPUs that no other job on this machine uses."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpu_locks


def run(options: argparse.Namespace) -> None:
    def say_waiting() -> None:
        print(f"waiting for {options.gpus} free GPUs", file=sys.stderr)

    available = gpu_locks.devices()
    taken = gpu_locks.acquire(options.gpus, available, gpu_locks.scope(), say_waiting)
    taken.pass_to_child()
    if taken.names:
        print(f"GPUs of this job: {', '.join(taken.names)}", file=sys.stderr)
    program, *_ = options.command
    # Python ignores this signal, and the command would inherit that.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvpe(program, options.command, os.environ | gpu_locks.environment(taken.names))
    except OSError as error:
        raise MptTrtError(f"{program}: cannot be run: {error.strerror}") from None
