"""Measures greedy decoding of one model shape on a GPU, with run.py's ONNX Runtime engine.

Weights are random. For each engine and number of rows, it measures milliseconds per step of one
token per row, milliseconds per prompt, and seconds and GPU memory of loading. The same run measures
the GPU's read rate, and a compiled PyTorch MPT whose step is a CUDA graph (float16, batch 1).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import REPOSITORY, timed, weight_bytes, write_result
from networks import network_without_plan, random_ft_checkpoint

sys.path.insert(0, str(REPOSITORY))

import numpy as np

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.engines.interface import StepModel
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.quantization.schemes import Quantization, WeightOnly

RECIPES = {
    "fp16": CalibratedQuantization(Quantization(None, "auto"), None),
    "int8_weight_only": CalibratedQuantization(Quantization(WeightOnly(8), "auto"), None),
    "int4_weight_only-g128": CalibratedQuantization(Quantization(WeightOnly(4, 128), "auto"), None),
}
# Number of first steps that are not counted, and of steps that are averaged.
WARM_UP = 8
STEPS = 64
GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """An engine and its measurements.

    max_rows: max_batch_size of the engine. batches: rows that decode together, from prompts of
    `start` tokens until the cache is full. prompts: lengths of single prompts.
    """

    calibrated: str
    max_rows: int
    cache_len: int = 512
    batches: tuple[int, ...] = (1,)
    start: int = 16
    prompts: tuple[int, ...] = ()


INT4 = "int4_weight_only-g128"
LONG = {"cache_len": 2304, "start": 2048, "prompts": (512, 2048)}
CASES = (
    Case("fp16", 64, batches=(1, 8, 64)),
    Case("fp16", 1, **LONG),
    Case(INT4, 8, batches=(1, 8)),
    Case(INT4, 64, batches=(1, 8, 64)),
    Case(INT4, 1, **LONG),
    Case(INT4, 16, **LONG),
    Case("int8_weight_only", 1),
    Case("int8_weight_only", 64, batches=(1, 8, 64)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", default="mpt-7b", help="shape (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-gpu-decode"))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--no_peer", action="store_true", help="without PyTorch's MPT")
    arguments = parser.parse_args()
    checkpoint = random_ft_checkpoint(arguments.folder, arguments.like, "float16")
    figures: dict = {"shape": arguments.like, "gpu": gpu_name(), "read_gb_per_s": read_rate() / 1e9}
    print(figures, flush=True)
    if not arguments.no_peer:
        from plain_decode import decode_ms

        figures["pytorch_ms"] = decode_ms(checkpoint, cache_len=512, steps=STEPS)
        print(figures["pytorch_ms"], flush=True)
    figures["cases"] = [
        measured(case, checkpoint, arguments.folder / "network")
        for case in CASES
        if case.calibrated in arguments.recipes
    ]
    print(write_result(f"gpu-decode-{arguments.like}", figures))


def measured(case: Case, checkpoint: FtCheckpoint, folder: Path) -> dict:
    from mpt_trt.engines.onnxruntime.cuda.engine import OnnxCudaEngine

    longest = max(case.start, *case.prompts, case.cache_len // 2)
    limits = BuildLimits(case.max_rows, longest, case.cache_len - longest)
    shutil.rmtree(folder, ignore_errors=True)
    manifest = network_without_plan(checkpoint, folder, limits, RECIPES[case.calibrated])
    before, started = gpu_memory_used(), time.perf_counter()
    model = OnnxCudaEngine(folder, manifest)
    result = {
        "variant": case.calibrated,
        "max_rows": case.max_rows,
        "cache_len": case.cache_len,
        "weights_gb": weight_bytes(folder) / 1e9,
        "load_seconds": time.perf_counter() - started,
        "gpu_memory_gb": (gpu_memory_used() - before) / 1e9,
        "decode_from": case.start,
        "decode_ms": {batch: step_ms(model, batch, case) for batch in case.batches},
        "prompt_ms": {length: prompt_ms(model, length) for length in case.prompts},
        "gpu_memory_gb_at_work": (gpu_memory_used() - before) / 1e9,
    }
    print(result, flush=True)
    return result


def step_ms(model: StepModel, batch: int, case: Case) -> dict[str, float]:
    """Measures greedy decoding until the cache is full: the first steps, the last, and all.

    These are figures of the second run; all steps are also measured in the first run, which
    captures steps.
    """
    prompts = [[100 + index % 1000 for index in range(case.start)] for _ in range(batch)]
    config = GenerationConfig(case.cache_len - case.start, end_ids=(), pad_id=0)
    times: list[float] = []

    def note(phase: str, _: int) -> None:
        if phase == "decode":
            times.append(time.perf_counter())

    def mean_ms(first: int, last: int) -> float:
        return 1e3 * (times[last] - times[first]) / (last - first)

    generate(model, prompts, config, on_step=note)
    found = {"all, the first time": mean_ms(WARM_UP, len(times) - 1)}
    times.clear()
    generate(model, prompts, config, on_step=note)
    last = len(times) - 1
    return found | {
        "first": mean_ms(WARM_UP, WARM_UP + STEPS),
        "last": mean_ms(last - STEPS, last),
        "all": mean_ms(WARM_UP, last),
    }


def prompt_ms(model: StepModel, length: int) -> float:
    """Measures reading one prompt up to its last logits, the median of five after a warm-up."""
    ids = np.arange(length, dtype=np.int64)[None] % 1000 + 100
    last = np.array([[0, length - 1]])
    zero = np.zeros(1, np.int64)
    model.start(1)
    seconds = [timed(lambda: model.step(ids, zero, last)) for _ in range(6)]
    return 1e3 * statistics.median(seconds[1:])


def gpu_name() -> str:
    from mpt_trt.system import gpus

    return gpus.names()[0]


def gpu_memory_used() -> int:
    from cuda.bindings import runtime as cudart

    status, free, total = cudart.cudaMemGetInfo()
    assert status == cudart.cudaError_t.cudaSuccess, status
    return total - free


def read_rate() -> float:
    """Measures the read rate over 4 GiB in bytes per second: PyTorch's float32 sum, best of 10."""
    import torch

    values = torch.ones(GIB, device="cuda")

    def read() -> None:
        values.sum()
        torch.cuda.synchronize()

    read()
    return values.nbytes / min(timed(read) for _ in range(10))


if __name__ == "__main__":
    main()
