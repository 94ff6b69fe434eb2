"""Run by `test_mpi.py` as every rank of an engine.

mpi_driver.py record FOLDER ENGINE...       FOLDER/{engine}.rank{r}.npz: tokens and logits
mpi_driver.py signal FOLDER ENGINE NAME     rank 1 sends itself this signal in mid-generation;
                                            FOLDER/pid{r}: the ranks' process ids
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpt_trt.cli.console import run_cli
from mpt_trt.engines.load import LoadedEngine, load_engine
from mpt_trt.engines.onnxruntime.cpu_engine import OnnxRuntimeEngine
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.scheduling.ranks import follow, lead
from support.batching import batched

# Rows of different lengths; one is longer than an engine takes in a step (engines_support.LIMITS).
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], list(range(20, 40))]
NEW_TOKENS = 6


class Recorder:
    """A StepModel that keeps the logits of another one."""

    def __init__(self, engine: LoadedEngine):
        self.model = engine.model
        self.logits: list[NDArray[np.float32]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def step(self, *arguments: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = self.model.step(*arguments)
        self.logits.append(logits.copy())
        return logits


def record(engine: LoadedEngine) -> dict[str, NDArray]:
    """`greedy`, `beams`, `long`, `batched`: new tokens; `logits`: of greedy search, `[n, vocab]`.

    Only the long prompt needs a step without any logits.
    """
    found = {}
    searches = (("greedy", PROMPTS, 1), ("beams", PROMPTS[:2], 2), ("long", PROMPTS[2:], 1))
    for name, prompts, num_beams in searches:
        config = GenerationConfig(NEW_TOKENS, end_ids=(), pad_id=0, num_beams=num_beams)
        recorder = Recorder(engine)
        outputs = generate(recorder, prompts, config)
        found[name] = np.array([[beam.tokens for beam in beams] for beams in outputs])
        if name == "greedy":
            found["logits"] = np.concatenate(recorder.logits)
    found["batched"] = np.array(batched_on_rank_0(engine))
    return found


def batched_on_rank_0(engine: LoadedEngine) -> list[tuple[int, ...]]:
    """Tokens of requests that rank 0 schedules, while the other ranks follow."""
    configs = [GenerationConfig(NEW_TOKENS, end_ids=(), pad_id=0)] * len(PROMPTS)
    ranks = engine.communicator
    if ranks is None:
        return batched(engine.model, PROMPTS, configs)
    tokens = None
    if ranks.rank == 0:
        leader = lead(engine.model, ranks)
        tokens = batched(leader, PROMPTS, configs)
        leader.keep_waiting()
        leader.end()
    else:
        follow(engine.model, ranks)
    return ranks.exchange(tokens)[0]


def record_all(folder: Path, engines: list[Path]) -> None:
    for path in engines:
        engine = load_engine(path, "onnxruntime", num_threads=1)
        rank = engine.communicator.rank
        cores = engine.communicator.num_cores()
        np.savez(folder / f"{path.name}.rank{rank}.npz", cores=cores, **record(engine))


def send_signal(folder: Path, path: Path, name: str) -> None:
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    engine = load_engine(path, "onnxruntime", num_threads=1)
    generated = []

    def on_token(_row: int, token: int) -> None:
        generated.append(token)
        if rank == 1 and len(generated) == 3:
            os.kill(os.getpid(), getattr(signal, name))

    generate(engine.model, PROMPTS[:1], GenerationConfig(8, (), 0), on_token)
    print("generated to the end")


def differ(path: Path) -> None:
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        OnnxRuntimeEngine.description = "another"
    load_engine(path, "onnxruntime", num_threads=1)
    print("loaded")


def main() -> None:
    action, folder, *rest = sys.argv[1:]
    if action == "record":
        record_all(Path(folder), [Path(name) for name in rest])
    elif action == "signal":
        send_signal(Path(folder), Path(rest[0]), rest[1])
    else:
        differ(Path(rest[0]))


if __name__ == "__main__":
    run_cli(main)
