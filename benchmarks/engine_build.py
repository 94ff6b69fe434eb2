"""Measures the build of one rank's engine without a GPU: time, memory and disk space.

The weights are random. For int4_awq, the calibration result has a scale of 1 for the inputs, and
scales from the largest weight of each group. The steps after it are those after a real calibration.

If an FT checkpoint of all blocks does not fit on the disk, --layers 12 --linked_layers 48 --tp 4
makes 12 blocks and links the files of the others to them, with exchanged ranks, so that no two
blocks of a rank are the same. (TensorRT would store equal blocks once.)
"""

from __future__ import annotations

import argparse
import configparser
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import Measured, make_random_checkpoint, measure, script, write_result

from mpt_trt.arrays.cast import convert
from mpt_trt.calibration.defaults import FILE_NAME
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.calibration.writer import calibration_writer
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.model.tensors import block_matrices, weights
from mpt_trt.quantization.calibrated_weights import AwqMatrix, KvAmax

QUANTIZATIONS = ("none", "int8_weight_only", "int4_weight_only", "int4_awq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", default="bench-1.3b", help="shape (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="blocks (default: the shape's)")
    parser.add_argument(
        "--linked_layers", type=int, help="as many blocks, by hard links to those of --layers"
    )
    parser.add_argument("--dtype", default="float16", help="(default: %(default)s)")
    parser.add_argument("--tp", type=int, default=1, help="ranks (default: %(default)s)")
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, default="none", help="(default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-build"))
    arguments = parser.parse_args()
    ft, network = arguments.folder / "ft", arguments.folder / "network"
    plan = arguments.folder / "plan"
    make_sources(arguments, ft)
    if arguments.linked_layers is not None:
        link_layers(ft / f"{arguments.tp}-gpu", arguments.linked_layers)
    for folder in (network, plan):
        shutil.rmtree(folder, ignore_errors=True)
    model = ft / f"{arguments.tp}-gpu"
    options = _quantization(arguments)
    words = ("--model_dir", model, "--output_dir", network, *options)
    steps = {
        "network": measure(script("make_networks.py", *words)),
        "plan": measure(script("build_rank.py", "--network_dir", network, "--output_dir", plan)),
    }
    figures = describe(arguments, steps, (ft, network, plan))
    print(", ".join(f"{name} {figures[name]:.2f}" for name in figures if "ratio" in name))
    print(f"{figures['seconds']:.0f} s")
    name = f"{arguments.like}-{arguments.dtype}-{arguments.quantization}-tp{arguments.tp}"
    layers = arguments.linked_layers or arguments.layers
    name += "" if layers is None else f"-{layers}-layers"
    print(write_result(f"engine-build-{name}", figures))


def make_sources(arguments: argparse.Namespace, ft: Path) -> None:
    """Makes the FT checkpoint and, for int4_awq, the calibration result, if they are missing."""
    checkpoint, calibration = arguments.folder / "checkpoint", arguments.folder / FILE_NAME
    is_awq = arguments.quantization == "int4_awq"
    if (ft / f"{arguments.tp}-gpu").exists() and (calibration.exists() or not is_awq):
        return
    if not checkpoint.exists():
        make_random_checkpoint(checkpoint, arguments.like, arguments.dtype, arguments.layers)
    words = ("-i", checkpoint, "-o", ft, "-t", arguments.dtype, "-tp", str(arguments.tp))
    measure(script("convert_hf_mpt_to_ft.py", *words))
    if is_awq:
        write_calibration(checkpoint, calibration)
    shutil.rmtree(checkpoint)


def link_layers(folder: Path, number: int) -> None:
    """Extends an FT checkpoint to `number` blocks with links to its files.

    Block i's files of rank r are those of block i % held and rank (r + i // held) % ranks.
    """
    ini = configparser.ConfigParser()
    ini.read(folder / "config.ini")
    held, ranks = (ini.getint("gpt", key) for key in ("n_layer", "tensor_parallelism"))
    if number > held * ranks:
        raise SystemExit(f"--linked_layers = {number}: at most {held * ranks} differ in a rank")
    manifest = json.loads((folder / "manifest.json").read_text())
    for layer in range(held, number):
        prefix = f"model.layers.{layer % held}."
        for source in folder.glob(f"{prefix}*"):
            *words, last, suffix = source.name.removeprefix(prefix).split(".")
            if last.isdigit():
                last = str((int(last) - layer // held) % ranks)
            target = folder / ".".join([f"model.layers.{layer}", *words, last, suffix])
            target.hardlink_to(source)
            manifest["files"][target.name] = manifest["files"][source.name]
    ini.set("gpt", "n_layer", str(max(held, number)))
    with (folder / "config.ini").open("w") as stream:
        ini.write(stream)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_calibration(folder: Path, target: Path) -> None:
    """Writes an int4_awq result with unchanged weights and unscaled inputs."""
    config = read_hf_config(folder)
    found = HfCheckpoint(folder, weights(config))
    with calibration_writer(target, config, found, np.dtype(np.float16)) as writer:
        writer.model(CalibrationPlan("int4_awq"))
        for layer in range(config.num_layers):
            matrices = block_matrices(config, layer)
            made = {name: _unscaled(found.tensor(w)) for name, w in matrices.items()}
            writer.block(layer, KvAmax(1.0, 1.0), made)


def _unscaled(weight: np.ndarray) -> AwqMatrix:
    scales = np.concatenate(list(_group_scales(weight))).astype(np.float32)
    return AwqMatrix(weight, scales, np.ones(weight.shape[1], np.float32))


def _group_scales(weight: np.ndarray, group_size: int = 128, rows: int = 64) -> Iterator:
    for start in range(0, len(weight), rows):
        block = convert(np.ascontiguousarray(weight[start : start + rows]), np.dtype(np.float32))
        yield np.abs(block).reshape(len(block), -1, group_size).max(axis=2) / 7


def _quantization(arguments: argparse.Namespace) -> tuple[str | Path, ...]:
    """Options of make_networks.py."""
    if arguments.quantization == "none":
        return ()
    options: tuple[str | Path, ...] = ("--quantization", arguments.quantization)
    if arguments.quantization == "int4_awq":
        options += ("--calibration", arguments.folder / FILE_NAME)
    return options


def describe(
    arguments: argparse.Namespace, steps: dict[str, Measured], folders: tuple[Path, ...]
) -> dict:
    network = folders[1]
    # Only the built rank's, because the networks of all ranks exist.
    files = json.loads((network / "rank0.network.json").read_text())["files"]
    weight_bytes = sum(entry["bytes"] for name, entry in files.items() if "/" in name)
    peak = max(run.peak_private_mib for run in steps.values())
    disk = int(subprocess.check_output(["du", "-sbc", *folders]).split()[-2])
    return {
        "shape": arguments.like,
        "layers": arguments.layers,
        "linked_layers": arguments.linked_layers,
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        "tp": arguments.tp,
        "weight_bytes": weight_bytes,
        "seconds": sum(run.seconds for run in steps.values()),
        "steps": steps,
        "peak_private_mib": peak,
        "ratio_private_memory_to_weights": peak * 2**20 / weight_bytes,
        "ratio_disk_to_weights": disk / weight_bytes,
    }


if __name__ == "__main__":
    main()
