"""Compares the speed of engines of one model under ONNX Runtime on the CPU, in one run.

Takes engine directories of the workflow. Steps of a single token alternate between the engines; the
figures are ratios of the CPU time of a step to that of the first engine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from common import REPOSITORY, weight_bytes, write_result

sys.path.insert(0, str(REPOSITORY))

from cache_cost import open_engine, step_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "engines", type=Path, nargs="+", help="such as trt_engines/M/int4_awq/1-gpu"
    )
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="(default: %(default)s)")
    arguments = parser.parse_args()
    models = {path: open_engine(path, arguments.threads) for path in arguments.engines}
    seconds: dict[Path, list[float]] = {path: [] for path in models}
    for _ in range(arguments.repeats):
        for path, model in models.items():
            started = time.process_time()
            step_seconds(model, arguments.steps)
            seconds[path].append((time.process_time() - started) / arguments.steps)
    medians = {path: statistics.median(values) for path, values in seconds.items()}
    first = next(iter(medians.values()))
    figures = {
        path.parent.name: {
            "step_cpu_time_ratio": median / first,
            "cpu_seconds_a_step": median,
            "range": [min(seconds[path]), max(seconds[path])],
            "weight_bytes": weight_bytes(path),
        }
        for path, median in medians.items()
    }
    model = arguments.engines[0].parents[1].name
    print(
        write_result(f"variant-speed-{model}", {"threads": arguments.threads, "engines": figures})
    )
    for name, values in figures.items():
        print(name, round(values["step_cpu_time_ratio"], 3))


if __name__ == "__main__":
    main()
