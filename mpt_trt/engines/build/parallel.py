"""Builds the plans of all ranks in parallel, in one process per rank with its own GPU, if any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mpt_trt.engines.spec import BuilderChoice
from mpt_trt.engines.tensorrt.packages import choose_package
from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpu_locks


def build_side_by_side(tool: Path, folder: Path, builder: BuilderChoice, tp_size: int) -> None:
    """Adds the plans of all ranks to the folder of their networks.

    tool: build_rank.py, which builds one plan. If a rank fails, the others are finished.

    Raises MptTrtError that names the rank, after the rank has printed its own message.
    """
    commands = [_command(tool, folder, builder, rank) for rank in range(tp_size)]
    environments = _environments(builder, tp_size)
    running: list[subprocess.Popen] = []
    try:
        for command, environment in zip(commands, environments, strict=True):
            # Sockets hold the GPUs of this process, so the command must inherit them.
            running.append(subprocess.Popen(command, env=environment, close_fds=False))
        failed = [rank for rank, process in enumerate(running) if process.wait() != 0]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    if failed:
        raise MptTrtError(f"rank {failed[0]} could not be built; its own message is above")


def _command(tool: Path, folder: Path, builder: BuilderChoice, rank: int) -> list[str]:
    return [
        sys.executable,
        str(tool),
        f"--network_dir={folder}",
        f"--rank={rank}",
        f"--backend={builder.backend}",
        f"--output_dir={folder}",
        # The networks were just made, so they need no check.
        "--trust",
        "--compute_capabilities",
        *builder.compute_capabilities,
    ]


def _environments(builder: BuilderChoice, tp_size: int) -> list[dict[str, str]]:
    """Environment of each rank's process; GPUs are assigned in turn."""
    names = gpu_locks.devices().names
    if choose_package(builder.backend).module != "tensorrt" or not names:
        return [dict(os.environ)] * tp_size
    gpus = [names[rank % len(names)] for rank in range(tp_size)]
    return [os.environ | gpu_locks.environment([gpu]) for gpu in gpus]
