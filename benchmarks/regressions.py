"""Runs a short set of benchmarks on small models, and compares ratios with recorded ones.

Prints a table and marks ratios that are worse by more than the noise of the recording. The exit
status does not depend on them, because timings of another or a busy machine prove nothing.
Recording runs the set several times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from common import REPOSITORY, describe_machine, measure, today

BENCHMARKS = Path(__file__).parent
RECORDED = BENCHMARKS / "recorded_ratios.json"
# Minimum, even if the runs of a recording agreed better.
LEAST_NOISE = 0.05

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Ratio:
    """Place of a ratio in a benchmark's result.

    over: key of the divisor, unless the value is already a ratio.
    """

    name: str
    value: Keys
    better: Literal["lower", "higher"]
    over: Keys = ()


@dataclass(frozen=True)
class Benchmark:
    """A script with its options, the ratios of its result, and its folder."""

    script: str
    options: tuple[str, ...]
    ratios: tuple[Ratio, ...]
    takes_folder: bool = True


def _decoding(network: str, what: str, *keys: str) -> Ratio:
    return Ratio(f"CPU, {network}: {what}", ("networks", network, *keys), "higher")


DEMO = ("--model_dir", "resources/mpt-demo", "--device", "cpu")
SMALL = ("--like", "bench-354m")
SHORT_SET = (
    Benchmark(
        "conversion.py",
        (*SMALL, "--tp", "1", "--repeats", "3"),
        (Ratio("conversion: time to cp's", ("runs", "float16 tp1", "ratio"), "lower"),),
    ),
    Benchmark(
        "engine_build.py",
        SMALL,
        (
            Ratio("build: memory to weights", ("ratio_private_memory_to_weights",), "lower"),
            Ratio("build: disk to weights", ("ratio_disk_to_weights",), "lower"),
        ),
    ),
    Benchmark(
        "cpu_decode.py",
        (*SMALL, "--layers", "6", "--prompts", "64", "--repeats", "3"),
        (
            _decoding("float32", "rate to transformers'", "decode_ratio_to_transformers"),
            _decoding("float32", "rate to the read limit", "decode_ratio_to_read_limit"),
            _decoding("float32", "prompt's to transformers'", "prompt_ratio_to_transformers", "64"),
            _decoding("int4_awq", "rate to transformers'", "decode_ratio_to_transformers"),
        ),
    ),
    Benchmark(
        "startup.py",
        ("--kinds", "help", "--repeats", "3"),
        (Ratio("slowest --help: CPU time to Python's", ("slowest_ratio", "help"), "lower"),),
        takes_folder=False,
    ),
    Benchmark(
        "calibration.py",
        (*DEMO, "--stock", "--formats", "fp8", "--samples", "8", "--length", "256"),
        (
            Ratio(
                "calibration, fp8: CPU time to ModelOpt's",
                ("runs", "calibrate fp8", "cpu_seconds"),
                "lower",
                over=("runs", "stock fp8", "cpu_seconds"),
            ),
        ),
    ),
)


@dataclass(frozen=True)
class Recorded:
    """A recorded ratio, the median of several runs.

    noise: largest distance of a run from the median, as a share of it.
    """

    ratio: float
    noise: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="record the ratios anew")
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of a recording (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-short"))
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    if arguments.record:
        write(RECORDED, record([run_all(arguments.folder) for _ in range(arguments.rounds)]))
        return
    found = run_all(arguments.folder)
    recorded, machine = read(RECORDED)
    print(table(found, recorded))
    if machine not in (None, asdict(describe_machine())):
        print(f"recorded on another machine or system: {machine}")


def run_all(folder: Path) -> dict[str, float]:
    """Measures every ratio of the short set, by name."""
    found = {}
    for benchmark in SHORT_SET:
        print(benchmark.script, "...", file=sys.stderr, flush=True)
        result = run(benchmark, folder / Path(benchmark.script).stem)
        found |= {ratio.name: value_of(ratio, result) for ratio in benchmark.ratios}
    return found


def run(benchmark: Benchmark, folder: Path) -> dict:
    """Runs a benchmark and reads its result."""
    options = [*benchmark.options, *(("--folder", folder) if benchmark.takes_folder else ())]
    with tempfile.TemporaryDirectory() as results:
        os.environ["BENCHMARK_RESULTS"] = results
        measure([sys.executable, BENCHMARKS / benchmark.script, *options])
        [path] = Path(results).iterdir()
        return json.loads(path.read_text())


def value_of(ratio: Ratio, result: dict) -> float:
    value = _at(ratio.value, result)
    return value / _at(ratio.over, result) if ratio.over else value


def _at(keys: Keys, result: dict) -> float:
    for key in keys:
        result = result[key]
    return float(result)


def record(rounds: list[dict[str, float]]) -> dict[str, Recorded]:
    """Runs the set several times; returns medians and the distance of runs from them."""
    recorded = {}
    for name in rounds[0]:
        values = [found[name] for found in rounds]
        median = statistics.median(values)
        noise = max(abs(value / median - 1) for value in values)
        recorded[name] = Recorded(median, max(noise, LEAST_NOISE))
    return recorded


def table(found: dict[str, float], recorded: dict[str, Recorded]) -> str:
    """Makes one line per ratio: name, current, recorded, change, and verdict."""
    better = {ratio.name: ratio.better for each in SHORT_SET for ratio in each.ratios}
    lines = [f"{'ratio':<46} {'now':>7} {'recorded':>8} {'change':>7}"]
    for name, now in found.items():
        if name not in recorded:
            lines.append(f"{name:<46} {now:>7.2f} {'-':>8} {'-':>7}  not recorded")
            continue
        was = recorded[name]
        verdict = judged(now, was, better[name])
        change = now / was.ratio - 1
        lines.append(
            f"{name:<46} {now:>7.2f} {was.ratio:>8.2f} {change:>+7.0%}  {verdict}".rstrip()
        )
    lines += [f"{name}: recorded, but not measured" for name in recorded.keys() - found.keys()]
    return "\n".join(lines)


def judged(now: float, was: Recorded, better: str) -> str:
    """Returns `WORSE` or `better` if the change exceeds the noise, otherwise nothing."""
    change = now / was.ratio - 1
    if abs(change) <= was.noise:
        return ""
    return "better" if (change < 0) == (better == "lower") else "WORSE"


def write(path: Path, recorded: dict[str, Recorded]) -> None:
    content = {
        "date": today(),
        "machine": asdict(describe_machine()),
        "ratios": {name: asdict(each) for name, each in recorded.items()},
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def read(path: Path) -> tuple[dict[str, Recorded], dict | None]:
    """Reads the recorded ratios and the machine; empty if nothing was recorded."""
    if not path.exists():
        return {}, None
    content = json.loads(path.read_text())
    # JSON turns the machine's tuples into lists.
    machine = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in content["machine"].items()
    }
    return {name: Recorded(**each) for name, each in content["ratios"].items()}, machine


if __name__ == "__main__":
    main()
