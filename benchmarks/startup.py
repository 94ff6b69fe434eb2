"""Measures start-up: each tool's --help, tools that load no model, and an idle Snakemake.

First makes the demo model's report, which takes minutes if it does not exist. Then runs each
command several times, in alternation. The figures are medians of wall-clock time and of CPU time
(user and system, which other work hardly changes), next to a Python that does nothing and a
Snakemake that only prints its version.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import REPOSITORY, SCRIPTS, measure, script, write_result

sys.path.insert(0, str(REPOSITORY))

import yaml

PYTHON, SNAKEMAKE = "python -c pass", "snakemake --version"
# Maximum seconds of a command of each kind.
LIMITS = {"help": 0.3, "start": 1.0, "workflow": 2.0}
ENGINE = "mpt-demo/fp16/1-gpu"
# run.py, ended before it loads the engine.
UNTIL_LOADING = """
import sys
sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]
from run import make_parser
options = make_parser().parse_args()
from mpt_trt.commands import run
def load_engine(*_): sys.exit()
run.load_engine = load_engine
run.run(options)
sys.exit("run.py did not come to loading")
"""

Command = list[str | Path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument(
        "--kinds", nargs="+", choices=LIMITS, default=list(LIMITS), help="(default: all)"
    )
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    if arguments.kinds != ["help"]:
        measure([*snakemake(), "-c2", *shipped()])
    with tempfile.TemporaryDirectory() as scratch:
        commands = {
            "bare": {
                PYTHON: [sys.executable, "-c", "pass"],
                SNAKEMAKE: [*snakemake(), "--version"],
            },
            "help": {path.name: [sys.executable, path, "--help"] for path in tools()},
            "start": starts(Path(scratch)),
            "workflow": workflow(),
        }
        kept = {k: some for k, some in commands.items() if k in ("bare", *arguments.kinds)}
        write(kept, arguments.repeats)


def write(commands: dict[str, dict[str, Command]], repeats: int) -> None:
    flat = {(kind, name): c for kind, some in commands.items() for name, c in some.items()}
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in flat}
    for _ in range(repeats):
        for key, command in flat.items():
            runs[key].append(timed(command))
    cpu, wall = ({k: median(run[i] for run in r) for k, r in runs.items()} for i in (0, 1))
    bare = {name: cpu["bare", name] for name in (PYTHON, SNAKEMAKE)}
    too_long = [f"{k} {n}" for (k, n), s in cpu.items() if s > LIMITS.get(k, s)]
    limits = {kind: limit for kind, limit in LIMITS.items() if kind in commands}
    figures = {
        "repeats": repeats,
        "limits_seconds": limits,
        "beyond_limit": too_long,
        "slowest_ratio": {k: max(cpu[k, n] for n in commands[k]) / bare[PYTHON] for k in limits},
        **{
            kind: {
                name: {
                    "cpu_seconds": cpu[kind, name],
                    "wall_seconds": wall[kind, name],
                    **{f"ratio to {b}": round(cpu[kind, name] / s, 2) for b, s in bare.items()},
                }
                for name in some
            }
            for kind, some in commands.items()
        },
    }
    for kind, limit in limits.items():
        slowest = max(commands[kind], key=lambda name: cpu[kind, name])
        print(f"{kind}: at most {cpu[kind, slowest]:.2f} s CPU ({slowest}), allowed {limit}")
    print(write_result("startup", figures))


def timed(command: Command) -> tuple[float, float]:
    """Measures seconds of CPU time, including child processes, and of wall-clock time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return user + system, wall


def median(values) -> float:
    return round(statistics.median(values), 3)


def snakemake() -> Command:
    return [sys.executable, "-m", "snakemake"]


def tools() -> list[Path]:
    """Lists the command-line tools; the other files of the folder are their modules."""
    return [path for path in sorted(SCRIPTS.glob("*.py")) if "__main__" in path.read_text()]


def shipped() -> list[str]:
    return ["reports/mpt-demo.html", *settings()["targets"]]


def settings() -> dict:
    return yaml.safe_load((REPOSITORY / "config.yaml").read_text())


def starts(scratch: Path) -> dict[str, Command]:
    """Commands that load no engine, with the inputs of the demo model's report."""
    networks, plans = (Path("build", kind, ENGINE) for kind in ("networks", "plans"))
    smoke_test = Path("smoke_tests", f"{ENGINE}.json")
    quality = Path("quality", f"{ENGINE}.json")
    engine = ["--engine_dir", Path("trt_engines", ENGINE), "--max_output_len", "8"]
    return {
        "convert_hf_mpt_to_ft.py, demo model": script(
            "convert_hf_mpt_to_ft.py", "-i", "resources/mpt-demo", "-o", scratch / "ft",
        ),
        "show_requirements.py": script("show_requirements.py", "--like", "mpt-7b"),
        "show_smoke_test.py": script("show_smoke_test.py", smoke_test),
        "assemble_engine.py": script(
            "assemble_engine.py", "--network_dir", networks, "--plan_dir", plans,
            "--output_dir", scratch / "engine",
        ),
        "make_networks.py": script(
            "make_networks.py", "--model_dir", "ft_ckpts/mpt-demo/fp16/1-gpu",
            "--output_dir", scratch / "network",
        ),
        "make_report.py": script(
            "make_report.py", "--model", "mpt-demo", "--variants", "fp16",
            "--quality", quality, "--smoke_tests", smoke_test,
            "--output", scratch / "report.html", "--items_dir", scratch / "items",
        ),
        "run.py, until it loads the engine": [
            sys.executable, "-c", UNTIL_LOADING, REPOSITORY, SCRIPTS, *engine,
        ],
    }  # fmt: skip


def workflow() -> dict[str, Command]:
    planned = [f"reports/{model}.html" for model in settings()["models"]]
    return {
        "nothing to do, demo model": [*snakemake(), "-c2", *shipped()],
        "plan of all models": [*snakemake(), "-c2", "-n", "-q", "--", *planned],
    }


if __name__ == "__main__":
    main()
