"""Measures greedy decoding on several GPUs, with run.py's ONNX Runtime engine and one rank per GPU.

Weights are random. For each number of ranks, variant and batch size, it measures milliseconds per
step of one token per row, milliseconds per prompt, and seconds of loading. The same ranks measure
their GPU's read rate, and NCCL's own all-reduces in a CUDA graph. The sum of reading a rank's
weights and of NCCL's time is the step's lower bound. A plain PyTorch MPT, divided among the same
GPUs, compiled, with NCCL in a CUDA graph, is the peer (float16, batch 1).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import REPOSITORY, measure, timed, write_result
from networks import manifest_without_plans, random_checkpoint_of_ranks

sys.path.insert(0, str(REPOSITORY))

import numpy as np

from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED, CalibratedQuantization
from mpt_trt.engines.build.rank_network import NetworkInputs, write_networks
from mpt_trt.engines.manifest import Manifest
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import Quantization, WeightOnly
from mpt_trt.system.mpi import Communicator, communicator

RECIPES = {
    "fp16": NOT_QUANTIZED,
    "int4_weight_only-g128": CalibratedQuantization(Quantization(WeightOnly(4, 128), "auto"), None),
}


@dataclass(frozen=True)
class Case:
    """An engine and its measurements.

    max_rows: max_batch_size. batches: rows that decode together, until the cache is full. prompts:
    lengths of single prompts.
    """

    recipe: str
    max_rows: int
    cache_len: int
    batches: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()


CASES = (
    Case("fp16", 64, 512, batches=(1, 8, 64)),
    Case("int4_weight_only-g128", 8, 512, batches=(1, 8)),
    Case("fp16", 1, 2304, prompts=(512, 2048)),
)
DECODE_FROM = 16
CACHE_LEN = 512
WARM_UP = 8
REPLAYS = 30
# Of ncclDataType_t.
FLOAT16 = 6
# A kernel that only reads has at least this many bytes to read.
READ_BYTES = 4 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", default="mpt-7b", help="shape (default: %(default)s)")
    parser.add_argument("--ranks", nargs="+", type=int, help="default: 1, 2 and 4, if there are")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-gpu-ranks"))
    parser.add_argument("--no_peer", action="store_true", help="without PyTorch's MPT")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(**arguments.work)
        return
    from mpt_trt.system import gpus

    ranks = arguments.ranks or [size for size in (1, 2, 4) if size <= len(gpus.names())]
    figures: dict = {"shape": arguments.like, "gpus": list(gpus.names()), "runs": []}
    for size in ranks:
        checkpoint = random_checkpoint_of_ranks(arguments.folder, arguments.like, "float16", size)
        for case in CASES:
            if case.recipe in arguments.recipes:
                figures["runs"].append(measured(arguments.folder, checkpoint, case))
        if not arguments.no_peer:
            peer = {"kind": "peer", "ft": str(checkpoint.folder)}
            found = run_ranks(arguments.folder, size, peer)
            figures["runs"].append({"ranks": size, "variant": "PyTorch"} | found[0])
            print(figures["runs"][-1], flush=True)
        shutil.rmtree(checkpoint.folder)
    print(write_result(f"gpu-ranks-{arguments.like}", figures))


def measured(folder: Path, checkpoint: FtCheckpoint, case: Case) -> dict:
    """Figures of one engine; times are those of the slowest rank."""
    networks, size = folder / "networks", checkpoint.tp_size
    shutil.rmtree(networks, ignore_errors=True)
    networks.mkdir(parents=True)
    longest = max(case.cache_len // 2, *case.prompts, 0)
    limits = BuildLimits(case.max_rows, longest, case.cache_len - longest)
    inputs = NetworkInputs(checkpoint, limits, VocabularySharding(), RECIPES[case.recipe])
    write_networks(inputs, networks)
    work = {"kind": "engine", "networks": str(networks), "size": size}
    work |= {"batches": case.batches, "prompts": case.prompts}
    each = run_ranks(folder, size, work)
    found: dict = {"ranks": size, "variant": case.recipe, "max_rows": case.max_rows}
    found["cache_len"] = case.cache_len
    for name, value in each[0].items():
        of_ranks = [figures[name] for figures in each]
        if isinstance(value, dict):
            found[name] = {key: max(figures[key] for figures in of_ranks) for key in value}
        else:
            found[name] = min(of_ranks) if name == "read_gb_per_s" else max(of_ranks)
    reading = 1e3 * found["read_gb"] / found["read_gb_per_s"]
    found["bound_ms"] = {key: reading + nccl for key, nccl in found["nccl_ms"].items()}
    print(found, flush=True)
    return found


def run_ranks(folder: Path, size: int, work: dict) -> list[dict]:
    """Runs `work` on every rank; returns their results."""
    results = folder / "results"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    order = json.dumps(work | {"results": str(results)})
    command: list[str | Path] = [sys.executable, __file__, "--work", order]
    if size > 1:
        mpirun = Path(sys.executable).with_name("mpirun")
        options = ["--allow-run-as-root", "--bind-to", "none", "--oversubscribe"]
        command = [mpirun, "-n", str(size), *options, *command]
    measure(command)
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(size)]


# --- a rank --------------------------------------------------------------------------------------


def work(kind: str, results: str, **arguments) -> None:
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))
    found = measure_engine(**arguments) if kind == "engine" else measure_peer(**arguments)
    (Path(results) / f"{rank}.json").write_text(json.dumps(found))


def measure_engine(networks: str, size: int, batches: list[int], prompts: list[int]) -> dict:
    from mpt_trt.engines.cuda.device import use_only
    from mpt_trt.engines.onnxruntime.cuda.engine import OnnxCudaEngine
    from mpt_trt.system.rank_gpus import own_gpu

    ranks = communicator(size)
    rank = 0 if ranks is None else ranks.rank
    if ranks is not None:
        use_only(own_gpu(ranks))
    folder, manifest = Path(networks), manifest_without_plans(Path(networks), size)
    started = time.perf_counter()
    engine = OnnxCudaEngine(folder, manifest, rank)
    if ranks is not None:
        engine.join(ranks)
    found: dict = {"load_seconds": time.perf_counter() - started}
    found["decode_ms"] = {str(batch): decode_ms(engine, batch) for batch in batches}
    found["prompt_ms"] = {str(length): prompt_ms(engine, length) for length in prompts}
    del engine
    found["read_gb"] = read_bytes(folder, manifest, rank) / 1e9
    found["read_gb_per_s"] = read_rate() / 1e9
    config = manifest.spec.config
    # After every layer's attention and feed-forward, and for the logits.
    count = 2 * config.num_layers + 1
    widths = {str(batch): batch * config.hidden_size for batch in batches}
    nothing = dict.fromkeys(widths, 0.0)
    is_alone = ranks is None or not widths
    found["nccl_ms"] = nothing if is_alone else nccl_ms(ranks, widths, count)
    return found


def read_bytes(folder: Path, manifest: Manifest, rank: int) -> int:
    """Bytes of weights that a step reads: the rank's own, of the embedding its part of the head."""
    config, size = manifest.spec.config, manifest.spec.tp_size
    weights = [name for name in manifest.ranks[rank].network_files if name.startswith("weights/")]
    stored = sum((folder / name).stat().st_size for name in weights)
    embedding = config.vocab_size * config.hidden_size * manifest.spec.element_bytes
    return stored - embedding + embedding // size


def decode_ms(model, batch: int) -> float:
    """Milliseconds per step of the second run; the first one captures steps."""
    prompts = [[100 + index % 1000 for index in range(DECODE_FROM)] for _ in range(batch)]
    config = GenerationConfig(CACHE_LEN - DECODE_FROM, end_ids=(), pad_id=0)
    times: list[float] = []

    def note(phase: str, _: int) -> None:
        if phase == "decode":
            times.append(time.perf_counter())

    for _ in range(2):
        times.clear()
        generate(model, prompts, config, on_step=note)
    return 1e3 * (times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP)


def prompt_ms(model, length: int) -> float:
    """Milliseconds for one prompt up to its last logits, the median of five after a warm-up."""
    ids = np.arange(length, dtype=np.int64)[None] % 1000 + 100
    last, zero = np.array([[0, length - 1]]), np.zeros(1, np.int64)
    model.start(1)
    seconds = [timed(lambda: model.step(ids, zero, last)) for _ in range(6)]
    return 1e3 * statistics.median(seconds[1:])


def nccl_ms(ranks: Communicator, widths: dict[str, int], count: int) -> dict[str, float]:
    """Milliseconds of `count` all-reduces of float16 `[width]` in a replayed graph, by width."""
    from mpt_trt.engines.cuda.graphs import StepGraphs
    from mpt_trt.engines.cuda.memory import DeviceBuffer, Stream
    from mpt_trt.engines.cuda.nccl import SUM, join_nccl

    nccl, stream = join_nccl(ranks), Stream()
    graphs, buffer = StepGraphs(stream.handle), DeviceBuffer(2 * max(widths.values()))
    address = ctypes.c_void_p(buffer.address)
    handles = (ctypes.c_void_p(nccl.pointer), ctypes.c_void_p(int(stream.handle)))

    def enqueue(width: int) -> None:
        arguments = (address, address, ctypes.c_size_t(width), FLOAT16, SUM, *handles)
        for _ in range(count):
            assert not nccl.library.ncclAllReduce(*arguments)

    def replay(width: int) -> None:
        once = partial(enqueue, width)
        for _ in range(REPLAYS):
            graphs.run(width, once, once)
        stream.synchronize()

    found = {}
    for name, width in widths.items():
        replay(width)
        found[name] = 1e3 * min(timed(partial(replay, width)) for _ in range(5)) / REPLAYS
    # NCCL waits for graphs.
    graphs.clear()
    return found


def read_rate() -> float:
    """Read rate in bytes per second: PyTorch's float32 sum over 4 GiB, best of 10."""
    import torch

    values = torch.ones(READ_BYTES // 4, device="cuda")

    def read() -> None:
        values.sum()
        torch.cuda.synchronize()

    read()
    return values.nbytes / min(timed(read) for _ in range(10))


def measure_peer(ft: str) -> dict:
    from plain_decode import decode_ms as peer_ms

    from mpt_trt.model.sharding import Rank

    checkpoint = read_ft_checkpoint(Path(ft))
    rank = Rank(int(os.environ.get("OMPI_COMM_WORLD_RANK", 0)), checkpoint.tp_size)
    return {"decode_ms": peer_ms(checkpoint, CACHE_LEN, 64, rank)}


if __name__ == "__main__":
    main()
