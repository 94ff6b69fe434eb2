"""Divergence over size: the engines of a model next to llama.cpp's quantizations of the same model.

Reads the measurements that the workflow has made in a folder (targets
`quality/MODEL/VARIANT/1-gpu.json`), and measures llama.cpp on the same windows against the same
reference: it writes the model as GGUF, quantizes it, and evaluates it on the CPU. That needs the
packages llama-cpp-python and gguf (the extra `frontier`). Sizes are those of all weights, embedding
included, without graphs, tokenizers and metadata.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from common import REPOSITORY, weight_bytes, write_result

from mpt_trt.evaluation.heldout import HeldOut, read_heldout
from mpt_trt.evaluation.llama_cpp import Point, measure_llama_cpp
from mpt_trt.evaluation.quality_result import read_quality


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--project", type=Path, default=REPOSITORY, help="folder of quality/ and trt_engines/")
    add("--model", default="mpt-demo", help="name in the configuration (default: %(default)s)")
    add("--model_dir", type=Path, default=REPOSITORY / "resources" / "mpt-demo")
    add("--variants", nargs="+", help="(default: all that have been measured)")
    add("--folder", type=Path, default=Path("build/benchmark-frontier"), help="for GGUF files")
    add("--llama_result", type=Path, help="a result whose points of llama.cpp are taken over")
    arguments = parser.parse_args()
    points = our_points(arguments.project, arguments.model, arguments.variants)
    heldout = read_heldout(
        arguments.project / "quality" / arguments.model / "reference.safetensors"
    )
    if arguments.llama_result is None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        measured = measure_llama_cpp(arguments.model_dir, None, heldout, arguments.folder)
        points += measured.points
    else:
        points += recorded_points(arguments.llama_result, heldout)
    points.sort(key=lambda point: point.megabytes)
    figures = {
        "model": arguments.model,
        "windows": list(heldout.inputs.shape),
        "text_hash": heldout.text_hash,
        "llama_cpp_python": metadata.version("llama-cpp-python"),
        "points": [asdict(point) for point in points],
    }
    print(write_result(f"quality-frontier-{arguments.model}", figures))
    for point in points:
        print(f"| {point.name} | {point.megabytes:.2f} | {point.kl:.4f} | {point.top1:.1%} |")


def our_points(project: Path, model: str, variants: list[str] | None) -> list[Point]:
    """Points of the engines that have been measured."""
    folder = project / "quality" / model
    names = variants or sorted(path.parent.name for path in folder.glob("*/1-gpu.json"))
    points = []
    for name in names:
        figures = read_quality(folder / name / "1-gpu.json").figures
        size = weight_bytes(project / "trt_engines" / model / name / "1-gpu") / 1e6
        points.append(Point(name, size, figures.kl.mean, figures.top1.mean))
    return points


def recorded_points(result: Path, heldout: HeldOut) -> list[Point]:
    """Points of llama.cpp in an earlier result on the same text."""
    content = json.loads(result.read_text())
    if (content["windows"], content["text_hash"]) != (
        list(heldout.inputs.shape),
        heldout.text_hash,
    ):
        raise RuntimeError(f"{result}: measured on other text")
    points = [Point(**each) for each in content["points"]]
    return [point for point in points if point.name.startswith("llama.cpp")]


if __name__ == "__main__":
    main()
