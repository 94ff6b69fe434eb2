"""Forks runs of programs from a process that has imported their packages.

server.py SOCKET SHIM

Imports nothing before the first request. Ends when its standard input does, and kills what still
runs.
"""

from __future__ import annotations

import array
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).parent)
from client import (  # noqa: E402
    HUB,
    LIGHT,
    SNAKEMAKE,
    TORCH,
    fixed_variables,
    is_calibrated,
    process_state,
)

sys.path.pop(0)

SNAKEMAKE_PACKAGES = (
    "snakemake.cli", "snakemake.api", "snakemake.executors.local",
    "snakemake_executor_plugin_slurm", "snakemake.report.html_reporter", "snakemake.benchmark",
    "docutils.parsers.rst", "smart_open", "dpath", "yte", "packaging.version", "jsonschema", "yaml",
    "pynvml", "xxhash",
)  # fmt: skip
LIGHT_PACKAGES = (
    "concurrent.futures", "configparser", "jsonschema", "logging", "ml_dtypes", "numpy", "onnx",
    "onnxruntime", "rich.progress", "rich.table", "safetensors", "xxhash", "yaml",
)  # fmt: skip
TOKENIZER_PACKAGES = (
    "transformers.models.auto.tokenization_auto", "transformers.models.mpt.configuration_mpt",
)  # fmt: skip
# Those of huggingface_hub, which itself reads variables when it is imported.
HUB_PACKAGES = ("httpx", "httpcore", "yaml", "tqdm.auto", "filelock", "fsspec", "packaging.version")
MODEL_PACKAGES = ("torch", "transformers.models.mpt.modeling_mpt")
PACKAGES = {
    SNAKEMAKE: SNAKEMAKE_PACKAGES,
    LIGHT: LIGHT_PACKAGES,
    HUB: HUB_PACKAGES,
    TORCH: (*LIGHT_PACKAGES, *MODEL_PACKAGES, *TOKENIZER_PACKAGES),
}
CALIBRATION_PACKAGES = ("modelopt.torch.quantization",)
# Of some tools, in addition.
TOOL_PACKAGES = {
    "build_rank.py": ("tensorrt_rtx",),
    "make_report.py": ("matplotlib.figure",),
    "run.py": TOKENIZER_PACKAGES,
    "encode_prompt.py": TOKENIZER_PACKAGES,
    "simulated_driver.py": ("pytest",),
    "cuda_ranks_driver.py": ("pytest",),
}


@dataclass(frozen=True)
class Request:
    arguments: list[str]
    folder: str
    environment: dict[str, str]
    cores: list[int]
    state: dict[str, object]

    def inherited(self, server: str) -> tuple[object, object]:
        """What a fork would miss if the server of this name does not have the same."""
        return fixed_variables(self.environment, server), self.state

    @property
    def packages(self) -> tuple[str, ...]:
        """What this run needs in addition to the others of its server."""
        if is_calibrated(self.arguments):
            return CALIBRATION_PACKAGES
        return TOOL_PACKAGES.get(Path(self.arguments[0]).name, ())


class Server:
    """Serves one socket. name: of the server, whose packages every run needs."""

    def __init__(self, listener: socket.socket, name: str):
        self._listener = listener
        self._name, self._packages = name, PACKAGES[name]
        self._inherited = fixed_variables(dict(os.environ), name), process_state()
        self._selector = selectors.DefaultSelector()
        # Of each run, by its process id: a descriptor of the process, and the client's connection.
        self._running: dict[int, tuple[int, socket.socket]] = {}

    def serve(self) -> Request | None:
        """Serves until the standard input ends, and then returns None.

        Returns in a new process, too: there with the request that it is for.
        """
        self._selector.register(0, selectors.EVENT_READ, "stop")
        self._selector.register(self._listener, selectors.EVENT_READ, "accept")
        while True:
            for key, _ in self._selector.select():
                if key.data == "stop":
                    self._kill_all()
                    return None
                if key.data == "accept":
                    if (request := self._accept()) is not None:
                        return request
                elif key.data[1] in self._running:
                    getattr(self, f"_{key.data[0]}")(key.data[1])

    def _accept(self) -> Request | None:
        connection, _ = self._listener.accept()
        try:
            request, streams = _received(connection)
        except (OSError, ValueError):
            connection.close()
            return None
        try:
            if request.inherited(self._name) != self._inherited:
                connection.close()
            elif self._start(request, connection):
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                return request
        finally:
            for stream in streams:
                os.close(stream)
        return None

    def _start(self, request: Request, connection: socket.socket) -> bool:
        """Forks; returns whether this is the new process."""
        _import((*self._packages, *request.packages))
        gc.collect()
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            connection.close()
            self._close()
            return True
        descriptor = os.pidfd_open(pid)
        self._running[pid] = (descriptor, connection)
        self._selector.register(descriptor, selectors.EVENT_READ, ("ended", pid))
        self._selector.register(connection, selectors.EVENT_READ, ("left", pid))
        self._answer(connection, pid)
        return False

    def _ended(self, pid: int) -> None:
        descriptor, connection = self._running.pop(pid)
        _, status = os.waitpid(pid, 0)
        self._selector.unregister(descriptor)
        os.close(descriptor)
        if connection.fileno() >= 0:
            self._answer(connection, os.waitstatus_to_exitcode(status))
            self._forget(connection)

    def _left(self, pid: int) -> None:
        """Kills a run whose client has been killed."""
        self._kill(pid)
        self._forget(self._running[pid][1])

    def _answer(self, connection: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):  # the client has been killed
            connection.sendall(f"{number}\n".encode())

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()

    def _kill(self, pid: int) -> None:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet
            os.kill(pid, signal.SIGKILL)

    def _kill_all(self) -> None:
        for pid in self._running:
            self._kill(pid)

    def _close(self) -> None:
        """Closes all files of the server, in a new process."""
        self._selector.close()
        self._listener.close()
        for descriptor, connection in self._running.values():
            os.close(descriptor)
            connection.close()


def _import(packages: tuple[str, ...]) -> None:
    if "torch" not in packages:
        # As mpt_trt.checkpoint.tokenizer does, and for the same reasons.
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    for name in packages:
        importlib.import_module(name)
    if "torch" not in packages:
        del sys.modules["torch"]
    if "snakemake.cli" in packages:
        _find_plugins()


@functools.cache
def _find_plugins() -> None:
    """Has Snakemake look for its plugins in all of site-packages; it remembers them."""
    importlib.import_module("snakemake.cli").get_argument_parser()


def _received(connection: socket.socket) -> tuple[Request, list[int]]:
    streams = array.array("i")
    size, rights, _, _ = connection.recvmsg(8, socket.CMSG_LEN(3 * streams.itemsize))
    for _, _, content in rights:
        streams.frombytes(content)
    with connection.makefile("rb") as stream:
        content = stream.read(int.from_bytes(size, "big"))
    return Request(**json.loads(content)), list(streams)


def _renew_standard_streams() -> None:
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)  # type: ignore[misc]
    for number, name in ((1, "stdout"), (2, "stderr")):
        is_line_buffered = number == 2 or os.isatty(number)
        errors = "backslashreplace" if number == 2 else None
        binary = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
        stream = io.TextIOWrapper(binary, errors=errors, line_buffering=is_line_buffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _run(request: Request, shim: str, base_path: list[str]) -> None:
    """Runs a module or a script as Python does."""
    os.setsid()
    os.sched_setaffinity(0, request.cores)
    _renew_standard_streams()
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    arguments = request.arguments
    sys.executable = shim
    sys.orig_argv = [shim, *arguments]
    given = request.environment.get("PYTHONPATH", "")
    more = [path for path in given.split(os.pathsep) if path]
    is_module = arguments[0] == "-m"
    first = request.folder if is_module else str(Path(arguments[0]).resolve().parent)
    is_safe = request.environment.get("PYTHONSAFEPATH", "") != ""
    sys.path[:] = [*[first] * (not is_safe), *more, *base_path]
    importlib.invalidate_caches()
    if is_module:
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def main() -> None:
    path, shim = sys.argv[1:]
    base_path = list(sys.path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        request = Server(listener, Path(path).name).serve()
    if request is not None:
        _run(request, shim, base_path)


if __name__ == "__main__":
    main()
