"""Plans of several ranks at a time: a process a rank, with a GPU of its own if it builds on one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from mpt_trt.engines.build.build import RANK_TOOL
from mpt_trt.engines.spec import BuilderChoice
from mpt_trt.engines.tensorrt.packages import choose_package
from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpu_locks

PAUSE_SECONDS = 0.05


def build_side_by_side(
    networks: Path, builder: BuilderChoice, targets: Mapping[int, Path], at_once: int
) -> None:
    """Makes the folder of each rank in `targets` with its plan, `at_once` of them at a time.

    When a rank fails, those that are being built are finished and no others are begun.

    Raises MptTrtError that names the rank; its own message has been printed before.
    """
    commands = {rank: _command(networks, rank, builder, path) for rank, path in targets.items()}
    if failed := _run(commands, _environments(builder, at_once)):
        raise MptTrtError(f"rank {failed[0]} could not be built; its own message is above")


def _command(networks: Path, rank: int, builder: BuilderChoice, target: Path) -> list[str]:
    return [
        sys.executable,
        str(RANK_TOOL),
        f"--network_dir={networks}",
        f"--rank={rank}",
        f"--backend={builder.backend}",
        f"--output_dir={target}",
        "--compute_capabilities",
        *builder.compute_capabilities,
    ]


def _environments(builder: BuilderChoice, at_once: int) -> list[dict[str, str]]:
    """Of each process that may run at a time; the GPUs there are go round."""
    names = gpu_locks.devices().names
    if choose_package(builder.backend).module != "tensorrt" or not names:
        return [dict(os.environ)] * at_once
    gpus = [names[index % len(names)] for index in range(at_once)]
    return [os.environ | gpu_locks.environment([gpu]) for gpu in gpus]


def _run(commands: Mapping[int, list[str]], environments: list[dict[str, str]]) -> list[int]:
    """Runs the commands, as many at a time as there are environments; returns which failed."""
    waiting, free = list(commands), list(environments)
    running: list[tuple[int, subprocess.Popen, dict[str, str]]] = []
    failed: list[int] = []
    try:
        while running or (waiting and not failed):
            while waiting and free and not failed:
                rank, environment = waiting.pop(0), free.pop(0)
                # The GPUs of this process are held by sockets, which the command must have, too.
                process = subprocess.Popen(commands[rank], env=environment, close_fds=False)
                running.append((rank, process, environment))
            time.sleep(PAUSE_SECONDS)
            ended = [each for each in running if each[1].poll() is not None]
            for each in ended:
                running.remove(each)
                free.append(each[2])
            failed += [rank for rank, process, _ in ended if process.returncode != 0]
    finally:
        for _, process, _ in running:
            process.terminate()
        for _, process, _ in running:
            process.wait()
    return failed
