"""Measures time and memory of an 8-bit KV cache on the CPU, against the network's type.

Runs the demo model in float32 under ONNX Runtime, with single tokens at the end of caches of two
lengths. The three caches alternate in one run; the figures are ratios of medians and of bytes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

from common import REPOSITORY, measure, script, write_result

sys.path.insert(0, str(REPOSITORY))

import numpy as np

DEMO = REPOSITORY / "resources" / "mpt-demo"
CACHES = {"auto": (), "int8": ("--int8_kv_cache",), "fp8": ("--fp8_kv_cache",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-cache"))
    arguments = parser.parse_args()
    lengths = {str(n): figures(arguments, n) for n in arguments.lengths}
    print(write_result("cache-cost-mpt-demo", {"threads": arguments.threads, "caches": lengths}))


def figures(arguments: argparse.Namespace, length: int) -> dict:
    engines = make_engines(arguments.folder, length)
    models = {name: open_engine(folder, arguments.threads) for name, folder in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.repeats):
        for name, model in models.items():
            seconds[name].append(step_seconds(model, arguments.steps))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: value / medians["auto"] for name, value in medians.items()}
    sizes = {name: cache_bytes(folder) for name, folder in engines.items()}
    print(length, {name: round(ratio, 2) for name, ratio in ratios.items()})
    return {
        "step_time_ratio": ratios,
        "cache_bytes_ratio": {name: size / sizes["auto"] for name, size in sizes.items()},
        "seconds_a_step": medians,
    }


def make_engines(folder: Path, length: int) -> dict[str, Path]:
    """Makes an engine directory for each kind of cache, once."""
    ft, npz = folder / "ft", folder / "kv" / "mpt_tp1_rank0.npz"
    if not npz.exists():
        measure(script("convert_hf_mpt_to_ft.py", "-i", DEMO, "-o", ft, "-t", "float32"))
        calibration = ("--qformat", "kv_cache", "--calib_size", "4", "--export_path", npz.parent)
        measure(script("quantize.py", "--model_dir", DEMO, *calibration))
    engines = {name: folder / f"{name}-{length}" for name in CACHES}
    for name, target in engines.items():
        if target.exists():
            continue
        quantized = () if name == "auto" else (*CACHES[name], "--quant_ckpt_path", npz)
        limits = ("--max_input_len", str(length - 64), "--max_output_len", "64")
        options = (*limits, "--max_batch_size", "1", "--compute_capabilities", "8.9")
        command = script("build.py", "--model_dir", ft / "1-gpu", *options, *quantized)
        measure([*command, "--output_dir", target])
    return engines


def open_engine(folder: Path, threads: int):
    from mpt_trt.engines.load import load_engine

    return load_engine(folder, "onnxruntime", threads).model


def cache_bytes(folder: Path) -> int:
    """Size of the network's cache buffers in bytes."""
    import onnx
    from onnx import helper

    graph = onnx.load(folder / "rank0.onnx", load_external_data=False).graph
    buffers = [i.type.tensor_type for i in graph.input if i.name.startswith("past_")]
    return sum(
        helper.tensor_dtype_to_np_dtype(buffer.elem_type).itemsize
        * math.prod(dim.dim_value or 1 for dim in buffer.shape.dim)
        for buffer in buffers
    )


def step_seconds(model, count: int) -> float:
    """Measures one token after a full cache, the mean of `count` steps."""
    tokens, logits = np.array([[100]]), np.array([[0, 0]])
    model.start(1)
    started = time.perf_counter()
    for step in range(count):
        model.step(tokens, np.array([model.capacity - count + step]), logits)
    return (time.perf_counter() - started) / count


if __name__ == "__main__":
    main()
