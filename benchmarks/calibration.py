"""Calibration against one plain forward pass over the same tokens, in one run.

Makes a random checkpoint, and measures seconds and peak memory of: a forward pass with the whole
model in memory (without reading it); reading the blocks; a forward pass block by block, as in
calibration; calibration for each format, including its file; a plain write of as many bytes to the
same disk; and, with --stock, ModelOpt's quantize on transformers' model, which writes no file. Work
that happens once per process (CUDA's start, ModelOpt's kernels) is done on one block before, and
counted separately.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from common import (
    REPOSITORY,
    SAMPLE_SECONDS,
    make_random_checkpoint,
    private_mib,
    write_result,
)

sys.path.insert(0, str(REPOSITORY))

import numpy as np
import torch

from mpt_trt.calibration.block_stream import Computation, equal_batch_size, stream_blocks
from mpt_trt.calibration.calibrate import calibrate
from mpt_trt.calibration.model_source import ModelSource, open_model
from mpt_trt.calibration.modelopt import modelopt_config
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.model.config import MptConfig
from mpt_trt.model.torch_block import PlainBlock, causal_bias, with_weights
from mpt_trt.model.torch_tensors import ModelTensors, embed
from mpt_trt.quantization.schemes import GROUPED, default_group_size
from mpt_trt.system.files import write_in_pieces

MIB = 1 << 20
WRITTEN_AT_ONCE = 64 * MIB


@dataclass
class Cost:
    """Cost of a run.

    cpu_seconds: sum over all threads. peak_gpu_mib: peak of PyTorch's allocations.
    peak_private_mib: host memory, see Measured.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_gpu_mib: float | None = None
    peak_private_mib: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--like", default="mpt-7b", help="shape (default: %(default)s)")
    add("--layers", type=int, help="blocks (default: the shape's)")
    add("--model_dir", type=Path, help="a checkpoint to take instead of a random one")
    add("--formats", nargs="+", default=["int4_awq", "fp8"], help="(default: int4_awq fp8)")
    add("--samples", type=int, default=32, help="(default: %(default)s)")
    add("--length", type=int, default=512, help="tokens of a sample (default: %(default)s)")
    add("--batch_size", type=int, default=8, help="(default: %(default)s)")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="(default: %(default)s)")
    add("--dtype", default="float16", help="what a GPU computes in (default: %(default)s)")
    add("--stock", action="store_true", help="also ModelOpt's quantize on the whole model")
    add("--folder", type=Path, default=Path("build/benchmark-calibration"))
    arguments = parser.parse_args()
    figures = make_bench(arguments).figures(arguments)
    print(write_result(f"calibration-{figures['model']}-{arguments.device}", figures))


@dataclass(frozen=True)
class Bench:
    source: ModelSource
    samples: torch.Tensor
    computation: Computation
    target: Path

    def figures(self, arguments: argparse.Namespace) -> dict:
        plans = {name: plan_for(name, self.source.config) for name in arguments.formats}
        first = dataclasses.replace(self.source.config, num_layers=1)
        one_block = dataclasses.replace(self.source, config=first)
        warm_up = {
            n: asdict(self.cost(partial(self.calibrate, one_block, plans[n]))) for n in plans
        }
        runs = {
            "forward, model in memory": self.forward_in_memory(),
            "reading blocks": self.cost(self.read_blocks),
            "forward, block by block": self.cost(self.forward_by_block),
        }
        sizes: dict[str, int] = {}
        for name, plan in plans.items():
            runs[f"calibrate {name}"] = self.cost(partial(self.calibrate, self.source, plan))
            sizes[name] = self.target.stat().st_size
            runs[f"writing {name}"] = self.cost(partial(self.write_plainly, sizes[name]))
            if arguments.stock:
                runs[f"stock {name}"] = self.stock(plan)
        self.target.unlink(missing_ok=True)
        forward = runs["forward, model in memory"].seconds
        by_block = runs["forward, block by block"].seconds
        is_gpu = self.computation.device == "cuda"
        return {
            "model": arguments.like if arguments.model_dir is None else arguments.model_dir.name,
            "layers": self.source.config.num_layers,
            "samples": list(self.samples.shape),
            "batch_size": equal_batch_size(len(self.samples), self.computation.batch_size),
            "computed_in": str(self.computation.dtype).removeprefix("torch."),
            "gpu": torch.cuda.get_device_name() if is_gpu else None,
            "ratio_to_forward": {n: run.seconds / forward for n, run in runs.items()},
            "ratio_to_forward_by_block": {n: run.seconds / by_block for n, run in runs.items()},
            "result_bytes": sizes,
            "written_gb_per_second": {
                n: size / 1e9 / runs[f"writing {n}"].seconds for n, size in sizes.items()
            },
            "runs": {name: asdict(run) for name, run in runs.items()},
            "once_a_process": warm_up,
        }

    def cost(self, work: Callable[[], None]) -> Cost:
        """Measures work, after removing its old file and waiting until the disk is idle."""
        self.target.unlink(missing_ok=True)
        os.sync()
        with measured(self.computation.device) as cost:
            work()
        return cost

    def calibrate(self, source: ModelSource, plan: CalibrationPlan) -> None:
        dtype = np.dtype(np.float16)
        calibrate(source, self.samples, plan, self.computation, dtype, self.target)

    def write_plainly(self, size: int) -> None:
        content = memoryview(np.ones(min(size, WRITTEN_AT_ONCE), np.uint8))
        with self.target.open("wb", buffering=0) as stream:
            for start in range(0, size, len(content)):
                write_in_pieces(stream, content[: size - start])

    def read_blocks(self) -> None:
        model = self.model(self.source.config)
        for layer in range(self.source.config.num_layers):
            model.tensors(f"blocks.{layer}.")

    def forward_by_block(self) -> None:
        stream_blocks(self.source, self.samples, self.computation, lambda _, block, run: run(block))

    def model(self, config: MptConfig) -> ModelTensors:
        device = torch.device(self.computation.device)
        return ModelTensors(config, self.source.reader, device, self.computation.dtype)

    @torch.no_grad()
    def forward_in_memory(self) -> Cost:
        """Measures a forward pass with all blocks in memory, after a warm-up pass."""
        config = self.source.config
        model = self.model(config)
        blocks = [
            with_weights(partial(PlainBlock, config), model.tensors(f"blocks.{layer}."))
            for layer in range(config.num_layers)
        ]
        embedding = model.tensor("wte.weight")
        length = self.samples.shape[1]
        bias = causal_bias(config, length).to(model.device, model.dtype)
        size = equal_batch_size(len(self.samples), self.computation.batch_size)

        def forward() -> None:
            for batch in self.samples.to(model.device).split(size):
                hidden = embed(model, embedding, batch)
                for block in blocks:
                    hidden = block(hidden, bias)

        forward()
        return self.cost(forward)

    def stock(self, plan: CalibrationPlan) -> Cost:
        """Measures mtq.quantize on transformers' model, which is read before the clock starts."""
        import modelopt.torch.quantization as mtq
        from transformers import MptForCausalLM

        device, dtype = self.computation.device, self.computation.dtype
        model = MptForCausalLM.from_pretrained(self.source.folder, dtype=dtype).to(device).eval()
        size = equal_batch_size(len(self.samples), self.computation.batch_size)

        def read_samples(model: torch.nn.Module) -> None:
            for batch in self.samples.to(device).split(size):
                model(batch, use_cache=False)

        cost = self.cost(lambda: mtq.quantize(model, modelopt_config(plan), read_samples))
        # ModelOpt leaves reference cycles, which would keep the weights in memory.
        model.to("meta")
        return cost


def make_bench(arguments: argparse.Namespace) -> Bench:
    folder = arguments.model_dir or arguments.folder / "checkpoint"
    if not folder.exists():
        make_random_checkpoint(folder, arguments.like, layers=arguments.layers)
    source = open_model(folder)
    generator = torch.Generator().manual_seed(0)
    size = (arguments.samples, arguments.length)
    samples = torch.randint(source.config.vocab_size, size, generator=generator)
    is_gpu = arguments.device == "cuda"
    dtype = getattr(torch, arguments.dtype) if is_gpu else torch.float32
    computation = Computation(arguments.device, dtype, arguments.batch_size)
    return Bench(source, samples, computation, arguments.folder / "result.npz")


def plan_for(name: str, config: MptConfig) -> CalibrationPlan:
    return CalibrationPlan(name, default_group_size(config) if name in GROUPED else None)


@contextlib.contextmanager
def measured(device: str) -> Iterator[Cost]:
    cost, done = Cost(), threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            cost.peak_private_mib = max(cost.peak_private_mib, private_mib(os.getpid()))

    watcher = threading.Thread(target=watch)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    watcher.start()
    started, cpu_started = time.perf_counter(), time.process_time()
    try:
        yield cost
        if device == "cuda":
            torch.cuda.synchronize()
            cost.peak_gpu_mib = torch.cuda.max_memory_allocated() / MIB
        cost.seconds = time.perf_counter() - started
        cost.cpu_seconds = time.process_time() - cpu_started
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    main()
