"""Measures Snakemake's planning of many engines: nothing made yet, and everything made.

Plans models x variants x (1, 2, 4, 8) ranks, up to the smoke tests. Artifacts are placeholders:
empty files with MPT-7B's numbers of files and links. Their records come from Snakemake's own
--touch on one model, copied for the other ones.
"""

from __future__ import annotations

import argparse
import base64
import functools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from common import REPOSITORY, Measured, measure, write_result

sys.path.insert(0, str(REPOSITORY))

from mpt_trt.checkpoint.known_models import hub_config, known_config
from mpt_trt.ft.layout import FtFile, ft_files
from mpt_trt.network.graph import WEIGHTS_FOLDER
from mpt_trt.workflow.target_names import STORAGES

TP_SIZES = (1, 2, 4, 8)
# Eight ranks are valid for it. All models are alike, so that records can be copied.
SHAPE = "mpt-7b"
RESULTS = ("build/smoke_tests", "smoke_tests")
TREES = ("revisions", "checkpoints", "ft_ckpts", "build/networks", "build/plans", "trt_engines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--variants", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-dag"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    models = [f"model{index:03}" for index in range(arguments.models)]
    variants = [f"variant{index:02}" for index in range(arguments.variants)]
    write_config(folder, models, variants)
    figures = {"models": len(models), "variants": len(variants), "tp_sizes": TP_SIZES}
    figures["nothing_made"] = repeated(folder, arguments.rounds)
    make_stand_ins(folder, models[0], variants)
    write_config(folder, models[:1], variants)
    subprocess.run(snakemake(folder, "--touch", "--forceall", "--latency-wait=0"), check=True)
    copy_model(folder, models[0], models[1:])
    write_config(folder, models, variants)
    figures["outputs"] = require_nothing_to_do(folder, len(models), variants)
    figures["everything_made"] = repeated(folder, arguments.rounds)
    made = outputs(models[0], variants)
    files = sum(len(output.files) + len(output.links) for output in made)
    figures["files"] = len(models) * files
    start = [cpu_seconds([sys.executable, "-m", "snakemake", "--version"]) for _ in range(5)]
    figures["median_cpu_seconds_snakemake_version"] = statistics.median(start)
    for name in ("nothing_made", "everything_made"):
        runs: list[Planned] = figures[name]
        seconds = statistics.median(each.cpu_seconds for each in runs)
        memory = max(each.run.peak_private_mib for each in runs)
        figures[f"median_cpu_seconds_{name}"] = seconds
        figures[name] = [asdict(each) for each in runs]
        print(f"{name}: {seconds:.1f} s of a core, {memory:.0f} MiB")
    print(write_result("dag-construction", figures))


def snakemake(folder: Path, *options: str) -> list[str | Path]:
    command = [sys.executable, "-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile"]
    return [*command, "--directory", folder, "--cores", "2", "--quiet", "all", *options]


@dataclass(frozen=True)
class Planned:
    """A measured dry run. cpu_seconds: CPU time, which hardly depends on other work."""

    run: Measured
    cpu_seconds: float


def repeated(folder: Path, rounds: int) -> list[Planned]:
    return [planned(folder) for _ in range(rounds)]


def planned(folder: Path) -> Planned:
    before = children_seconds()
    run = measure(snakemake(folder, "--dry-run"))
    return Planned(run, children_seconds() - before)


def cpu_seconds(command: list[str]) -> float:
    before = children_seconds()
    measure(command)
    return children_seconds() - before


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def require_nothing_to_do(folder: Path, num_models: int, variants: list[str]) -> int:
    """Counts the outputs that Snakemake has records of.

    Raises RuntimeError if outputs have none, or if a dry run has jobs: it would not measure an idle
    plan.
    """
    found = sum(1 for path in (folder / ".snakemake/metadata").rglob("*") if path.is_file())
    storages = {storage_of(variants, variant) for variant in variants}
    # Networks, engine, and results; a plan per rank.
    of_engines = len(variants) * sum(2 + len(RESULTS) + tp for tp in TP_SIZES)
    expected = num_models * (2 + len(storages) * len(TP_SIZES) + of_engines)
    if found < expected:
        raise RuntimeError(f"{found} records of outputs instead of at least {expected}")
    command = snakemake(folder, "--dry-run")
    command[command.index("all")] = "rules"
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    output = result.stdout + result.stderr
    if "Nothing to be done" not in output:
        raise RuntimeError(f"placeholders are not taken for results:\n{output[-2000:]}")
    return found


def write_config(folder: Path, models: list[str], variants: list[str]) -> None:
    content = {
        "models": {name: {"source": f"mosaicml/{SHAPE}"} for name in models},
        "variants": {
            name: {"dtype": STORAGES[storage_of(variants, name)], "max_batch_size": 1 + index}
            for index, name in enumerate(variants)
        },
        "targets": [
            f"smoke_tests/{model}/{variant}/{tp}-gpu.json"
            for model in models
            for variant in variants
            for tp in TP_SIZES
        ],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def make_stand_ins(folder: Path, model: str, variants: list[str]) -> None:
    """Makes empty folders and files as placeholders for all artifacts of one model."""
    for output in outputs(model, variants):
        target = folder / output.folder
        for path in output.files:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).touch()
        for path, source in output.links.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / source, target / path)
        if output.folder == f"checkpoints/{model}":
            (target / "config.json").write_text(json.dumps(hub_config(SHAPE)))
    for variant in variants:
        for tp in TP_SIZES:
            for tree in RESULTS:
                result = folder / f"{tree}/{model}/{variant}/{tp}-gpu.json"
                result.parent.mkdir(parents=True, exist_ok=True)
                result.write_text("{}\n")


@dataclass(frozen=True)
class Output:
    """A folder, the names of files in it, and the targets of its links."""

    folder: str
    files: list[str]
    links: dict[str, str] = field(default_factory=dict)


def outputs(model: str, variants: list[str]) -> Iterator[Output]:
    yield Output(f"revisions/{model}", ["revision.json"])
    yield Output(f"checkpoints/{model}", ["config.json", "tokenizer.json"])
    for tp in TP_SIZES:
        for storage in STORAGES:
            names = [file.name for file in weight_files(storage, tp)]
            yield Output(f"ft_ckpts/{model}/{storage}/{tp}-gpu", names)
        for variant in variants:
            yield from outputs_of_engine(model, variant, storage_of(variants, variant), tp)


def outputs_of_engine(model: str, variant: str, storage: str, tp: int) -> Iterator[Output]:
    networks, plans, engine = (
        f"{stage}/{model}/{variant}/{tp}-gpu"
        for stage in ("build/networks", "build/plans", "trt_engines")
    )
    weights = {
        f"{WEIGHTS_FOLDER}/{file.name}": f"ft_ckpts/{model}/{storage}/{tp}-gpu/{file.name}"
        for file in weight_files(storage, tp)
        if file.weight.hf_name is not None
    }
    graphs = [f"rank{rank}.onnx" for rank in range(tp)]
    built = [f"rank{rank}.engine" for rank in range(tp)]
    yield Output(networks, [*graphs, *(f"rank{rank}.network.json" for rank in range(tp))], weights)
    yield Output(plans, [*built, *(f"rank{rank}.engine.json" for rank in range(tp))])
    links = {name: f"{networks}/{name}" for name in graphs}
    links |= {name: f"{plans}/{name}" for name in built}
    yield Output(engine, ["config.json"], weights | links)


@functools.cache
def weight_files(storage: str, tp: int) -> tuple[FtFile, ...]:
    return tuple(ft_files(known_config(SHAPE), tp, STORAGES[storage]))


def storage_of(variants: list[str], variant: str) -> str:
    return list(STORAGES)[variants.index(variant) % len(STORAGES)]


def copy_model(folder: Path, model: str, others: list[str]) -> None:
    """Copies one model's artifacts to others, including time stamps and Snakemake's records."""
    records = {path: path.read_text() for path in (folder / ".snakemake/metadata").iterdir()}
    for other in others:
        for tree in (*TREES, *RESULTS):
            # Links, because the files of all models are alike, and there are millions.
            command = ["cp", "--archive", "--link", folder / tree / model, folder / tree / other]
            subprocess.run(command, check=True)
        for path, text in records.items():
            name = base64.b64decode(path.name).decode().replace(model, other)
            copy = path.with_name(base64.b64encode(name.encode()).decode())
            copy.write_text(text.replace(model, other))


if __name__ == "__main__":
    main()
