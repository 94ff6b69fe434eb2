"""Measures a random model's way from checkpoint to verified engine, through Snakemake.

Prints one line per step: seconds and memory from Snakemake's `benchmark:` files, and the size of
the step's output. Making the random checkpoint is not a step.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from common import REPOSITORY, make_random_checkpoint, write_result

MODEL = "random"
RESOURCES = REPOSITORY / "resources"
# Output of each rule; other rules write little.
OUTPUTS = {
    "convert_checkpoint": "ft_ckpts",
    "quantize": "quantized",
    "make_networks": "build/networks",
    "build_rank": "build/plans",
    "assemble_engine": "trt_engines",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", default="mpt-7b", help="shape (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="number of blocks (default: the shape's)")
    parser.add_argument("--variant", default="int4_awq", help="of config.yaml")
    parser.add_argument("--tp", type=int, default=1, help="ranks (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=32, help="of calibration")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-whole-way"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder / "checkpoint"
    make_random_checkpoint(checkpoint, arguments.like, layers=arguments.layers)
    write_config(folder, checkpoint, arguments.samples)
    target = f"smoke_tests/{MODEL}/{arguments.variant}/{arguments.tp}-gpu.json"
    started = time.perf_counter()
    run_snakemake(folder, target, arguments.cores)
    figures = {
        "shape": arguments.like,
        "layers": arguments.layers,
        "variant": arguments.variant,
        "tp_size": arguments.tp,
        "calibration_samples": arguments.samples,
        "checkpoint_gb": disk_gb(checkpoint),
        "seconds": time.perf_counter() - started,
        "steps": steps(folder),
        "smoke_test": json.loads((folder / target).read_text()),
    }
    print_table(figures)
    name = f"whole-way-{arguments.like}-{arguments.variant}-tp{arguments.tp}"
    print(write_result(name, figures))


def write_config(folder: Path, checkpoint: Path, samples: int) -> None:
    """Writes the repository's configuration with the random model, and a generic tokenizer."""
    content = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    tokenizer = str(RESOURCES / "mpt-demo")
    content["models"] = {MODEL: {"source": str(checkpoint), "tokenizer": tokenizer}}
    # With random weights, no token stands out, so top-1 agreement is meaningless.
    for variant in content["variants"].values():
        variant.setdefault("tolerance", {})["min_top1"] = 0.0
    content["calibration"] = {"num_samples": samples, "sequence_length": 512}
    content["targets"] = []
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def run_snakemake(folder: Path, target: str, cores: int) -> None:
    command = [sys.executable, "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile"]
    command += ["--directory", folder, "--cores", str(cores), target]
    subprocess.run([str(word) for word in command], check=True)


def steps(folder: Path) -> list[dict]:
    """Lists the steps in the order in which they ended."""
    paths = sorted((folder / "logs").rglob("*.tsv"), key=lambda path: path.stat().st_mtime_ns)
    return [step(folder, path) for path in paths]


def step(folder: Path, path: Path) -> dict:
    rule = path.relative_to(folder / "logs").parts[0]
    with path.open(newline="") as stream:
        [row] = csv.DictReader(stream, delimiter="\t")
    output = OUTPUTS.get(rule)
    return {
        "rule": rule,
        "seconds": float(row["s"]),
        "cpu_seconds": float(row["cpu_time"]),
        # Memory of the process including pages of mapped files, and its private memory.
        "max_rss_gb": float(row["max_rss"]) * 2**20 / 1e9,
        "max_uss_gb": float(row["max_uss"]) * 2**20 / 1e9,
        "output_gb": None if output is None else disk_gb(folder / output),
    }


def disk_gb(folder: Path) -> float:
    """Disk space as reported by `du`: a file with two names counts once."""
    output = subprocess.check_output(["du", "--summarize", "--block-size=1", folder], text=True)
    return int(output.split()[0]) / 1e9


def print_table(figures: dict) -> None:
    print("| step | seconds | CPU seconds | memory, GB | of it its own | on disk, GB |")
    print("|---|---:|---:|---:|---:|---:|")
    for each in figures["steps"]:
        size = "" if each["output_gb"] is None else f"{each['output_gb']:.2f}"
        print(
            f"| {each['rule']} | {each['seconds']:.1f} | {each['cpu_seconds']:.1f} "
            f"| {each['max_rss_gb']:.1f} | {each['max_uss_gb']:.1f} | {size} |"
        )
    print(f"| all | {figures['seconds']:.1f} | | | | |")


if __name__ == "__main__":
    main()
