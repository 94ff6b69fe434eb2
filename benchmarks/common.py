"""What the benchmarks share: measured commands, and results that say what was measured where."""

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
sys.path.insert(0, str(REPOSITORY))

from mpt_trt.system.machine import describe_machine
from mpt_trt.system.process import wait_without_spinning

# As the tools do; benchmarks import PyTorch after this module.
wait_without_spinning()

# Where results go, if not to those that are kept.
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
    """One run of a command.

    peak_private_mib: most memory that the system could not reclaim (RssAnon), in MiB; pages of
    memory-mapped files are not in it.
    """

    seconds: float
    peak_private_mib: float


def measure(command: list[str | Path]) -> Measured:
    """Runs a command to its end; raises RuntimeError with its messages when it fails."""
    # A pipe that nobody reads before the end would stop a command that says much.
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
    """The command line of one of our own tools."""
    return [sys.executable, SCRIPTS / name, *arguments]


def make_random_checkpoint(
    target: Path, like: str, dtype: str = "float16", layers: int | None = None
) -> None:
    """layers: number of blocks, None for the shape's own."""
    words: list[str | Path] = ["--like", like, "--dtype", dtype, "--output_dir", target]
    words += [] if layers is None else ["--layers", str(layers)]
    measure(script("make_random_checkpoint.py", *words))


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def weight_bytes(folder: Path) -> int:
    """Bytes of weights that a step of one token reads of the network in `folder`.

    Every weight once; of the embedding, the head's use.
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
    """RssAnon of a process and of all below it; what those share is counted for each."""
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
