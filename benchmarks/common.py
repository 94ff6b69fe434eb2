"""Shared parts of the benchmarks: measured commands, and result files with the machine."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = REPOSITORY / "workflow_scripts"
FOLDERS = (SCRIPTS, SCRIPTS / "steps", REPOSITORY / "tools")
sys.path.insert(0, str(REPOSITORY))

from mpt_trt.system.machine import describe_machine
from mpt_trt.system.process import wait_without_spinning

# Like the tools; benchmarks import PyTorch after this module.
wait_without_spinning()

# Folder of the results, if they are not to be committed.
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))
PACKAGES = (
    "torch",
    "transformers",
    "nvidia_modelopt",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt_rtx_cu13",
    "numpy",
)
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Measured:
    """A measured run of a command.

    peak_private_mib: peak memory that the system could not reclaim (RssAnon), in MiB, without pages
    of memory-mapped files.
    """

    seconds: float
    peak_private_mib: float


def measure(command: list[str | Path]) -> Measured:
    """Runs a command to its end; raises RuntimeError with its messages when it fails."""
    # An unread pipe would block a command with much output.
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=subprocess.STDOUT
        )
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, private_mib(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            raise RuntimeError(f"{command} failed:\n{output.read()}")
    return Measured(seconds, peak)


def script(name: str, *arguments: str | Path) -> list[str | Path]:
    """Command line of one of mpt-trt's tools."""
    (path,) = (folder / name for folder in FOLDERS if (folder / name).exists())
    return [sys.executable, path, *arguments]


def make_random_checkpoint(
    target: Path, like: str, dtype: str = "float16", layers: int | None = None
) -> None:
    """Makes a random checkpoint. layers: number of blocks; None: the shape's own."""
    words: list[str | Path] = ["--like", like, "--dtype", dtype, "--output_dir", target]
    words += [] if layers is None else ["--layers", str(layers)]
    measure(script("make_random_checkpoint.py", *words))


def timed(function: Callable[[], object]) -> float:
    """Measures the seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def weight_bytes(folder: Path) -> int:
    """Bytes of weights that a step of one token reads from the network in `folder`.

    Counts every weight once, and the embedding as the head.
    """
    return sum(path.stat().st_size for path in (folder / "weights").iterdir())


def write_result(name: str, figures: dict) -> Path:
    """Writes `results/{date}-{name}.json` with the machine, the versions and the command."""
    date = today()
    content = {
        "date": date,
        "command": " ".join(["python", *sys.argv]),
        "machine": asdict(describe_machine()),
        "versions": {package: _version(package) for package in PACKAGES},
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date}-{name}.json"
    path.write_text(json.dumps(content, indent=2, default=_plain) + "\n")
    return path


def today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def _plain(value: object) -> object:
    if isinstance(value, Measured):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} in a result")


def private_mib(pid: int) -> float:
    """RssAnon of a process and its descendants; shared pages count for each."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), "RssAnon: 0")
    return int(line.split()[1]) / 1024 + sum(private_mib(int(child)) for child in children)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
