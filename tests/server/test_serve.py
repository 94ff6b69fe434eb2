"""serve.py as a program: its address, its end, and what it refuses to start with."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from mpt_trt.errors import MptTrtError
from support.demo import make_demo_engine
from support.engines import call_tool, command, start_tool


def address_of(server: subprocess.Popen) -> str:
    """Waits until the server listens."""
    lines = []
    while not (found := re.search(r"on (http://127\.0\.0\.1:\d+)$", "".join(lines).strip())):
        lines.append(server.stderr.readline())
        assert lines[-1], lines
    assert lines[0].startswith("Runtime: ONNX Runtime")
    return found[1]


def end_during_a_stream(server: subprocess.Popen, url: str, pid: int) -> None:
    """Sends SIGTERM: the request that runs is answered, then the program ends with status 0."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    stream = client.completions.create(
        model="mpt-demo", prompt="The", max_tokens=90, seed=1, stream=True
    )
    next(iter(stream))
    os.kill(pid, signal.SIGTERM)
    assert list(stream)[-1].choices[0].finish_reason in ("length", "stop")
    assert server.wait(timeout=30) == 0, server.stderr.read()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_sigterm_lets_requests_end(demo_engine: Path) -> None:
    server = start_tool("serve.py", "--engine_dir", demo_engine, "--port=0", "--num_threads=1")
    try:
        end_during_a_stream(server, address_of(server), server.pid)
    finally:
        server.kill()
        server.communicate()


def test_ranks_serve_together_and_end_with_the_first(tmp_path: Path) -> None:
    engine_dir = make_demo_engine(tmp_path, tp_size=2)
    # Where pip puts it.
    launcher = Path(sys.executable).with_name("mpirun")
    tool = command("serve.py", "--engine_dir", engine_dir, "--port=0", "--num_threads=1")
    server = subprocess.Popen(
        [launcher, "-n", "2", "--oversubscribe", "--allow-run-as-root", *tool],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = address_of(server)
        (rank_0,) = (
            pid for pid in children(server.pid) if "OMPI_COMM_WORLD_RANK=0" in variables(pid)
        )
        end_during_a_stream(server, url, rank_0)
    finally:
        server.terminate()  # mpirun then ends the ranks
        server.communicate(timeout=30)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def variables(pid: int) -> list[str]:
    """Environment variables of a process, as NAME=VALUE."""
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def test_a_port_that_is_taken(demo_engine: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(MptTrtError, match=f"--port {port}: Address already in use"):
            call_tool("serve.py", "--engine_dir", demo_engine, "--port", port, "--num_threads=1")


def test_threads_are_rejected_by_the_name_of_their_option(demo_engine: Path) -> None:
    with pytest.raises(MptTrtError, match=r"^--num_threads = -1: 0 "):
        call_tool("serve.py", f"--engine_dir={demo_engine}", "--num_threads=-1")


@pytest.mark.parametrize("port", ["99999", "-1", "http"])
def test_a_number_that_is_no_port(port: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        call_tool("serve.py", "--engine_dir=any", f"--port={port}")
    assert f"{port!r} is not a port: 0 to 65535 are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "allowed", "values"),
    [
        ("--max_waiting", "an integer of at least 0", ["-1", "nan", "inf", "1.5"]),
        ("--max_body_bytes", "an integer of at least 1", ["0", "-1", "nan", "inf"]),
        ("--piece_tokens", "an integer of at least 1", ["0", "-1", "nan", "inf"]),
        (
            "--timeout",
            "a finite number of seconds above 0",
            ["0", "-1", "nan", "inf", "1e400", "x"],
        ),
        ("--drain", "an integer of at least 0", ["-1", "nan", "inf", "0.5", ""]),
    ],
)
def test_numbers_that_limit_nothing(
    option: str, allowed: str, values: list[str], capsys: pytest.CaptureFixture
) -> None:
    for value in values:
        with pytest.raises(SystemExit):
            call_tool("serve.py", "--engine_dir=any", f"{option}={value}")
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: argument {option}: {value!r} is not {allowed}; see ")
