"""Starts the servers, and makes a folder of programs with a `python` that asks them."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support.forks.client import HUB, LIGHT, SNAKEMAKE, TORCH

HERE = Path(__file__).parent
# The path of the stand-in for Python, for the processes of pytest-xdist.
VARIABLE = "MPT_TRT_FORKED_PYTHON"
# mpt_trt sets these before it imports packages that read them.
ENVIRONMENT = {
    "ORT_DISABLE_TELEMETRY": "1",
    "OMP_WAIT_POLICY": "passive",
    "OPENBLAS_THREAD_TIMEOUT": "4",
}


def forked_python() -> str:
    """The stand-in for Python, or Python itself if there are no servers."""
    return os.environ.get(VARIABLE, sys.executable)


@contextlib.contextmanager
def serving_forks() -> Iterator[None]:
    """Has servers ready, each of which costs nothing before its first request."""
    with (
        tempfile.TemporaryDirectory(prefix="mpt-trt-forks-") as name,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(name)
        shim = _make_programs(folder)
        for kind in (SNAKEMAKE, LIGHT, TORCH, HUB):
            stack.enter_context(_server(folder / kind, shim))
        os.environ[VARIABLE] = str(shim)
        try:
            yield
        finally:
            del os.environ[VARIABLE]


def _make_programs(folder: Path) -> Path:
    """Makes `bin` like the folder of the running Python, whose programs find each other there."""
    programs = folder / "bin"
    programs.mkdir()
    python = Path(sys.executable)
    for program in python.parent.iterdir():
        if not program.name.startswith("python"):
            (programs / program.name).symlink_to(program)
    words = [sys.executable, "-IS", HERE / "client.py", sys.executable, folder]
    command = " ".join(shlex.quote(str(word)) for word in words)
    shim = programs / "python"
    shim.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    shim.chmod(0o755)
    return shim


@contextlib.contextmanager
def _server(socket: Path, shim: Path) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, HERE / "server.py", socket, shim],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | ENVIRONMENT,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.communicate()
