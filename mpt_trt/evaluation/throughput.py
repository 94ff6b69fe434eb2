"""Speed of an engine over batch sizes, prompt lengths and output lengths."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mpt_trt.engines.interface import StepModel
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.measured_engine import MeasuredEngine
from mpt_trt.evaluation.result_file import read_result
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate_steps
from mpt_trt.system.files import write_json


@dataclass(frozen=True)
class Load:
    """A batch: prompts, tokens per prompt, and new tokens per prompt."""

    batch_size: int
    prompt_len: int
    new_tokens: int


@dataclass(frozen=True)
class Spread:
    """Median and 99th percentile (nearest rank) of times in seconds."""

    median: float
    p99: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        rank = -(-99 * len(times) // 100) - 1
        return cls(statistics.median(times), sorted(times)[rank])


@dataclass(frozen=True)
class LoadSpeed:
    """Speed under one load.

    first_token_s: from the request to the first token, over rounds. between_tokens_s: between two
    tokens of a row, over all steps of all rounds; None for outputs of one token. tokens_per_s: new
    tokens of all rows per second, prompts included in the time; the median of rounds.
    """

    load: Load
    first_token_s: Spread
    between_tokens_s: Spread | None
    tokens_per_s: float
    rounds: int


@dataclass(frozen=True, kw_only=True)
class ThroughputResult(MeasuredEngine):
    """Speeds of an engine under each load."""

    speeds: tuple[LoadSpeed, ...]


def all_loads(
    model: StepModel,
    batch_sizes: Sequence[int],
    prompt_lens: Sequence[int],
    output_lens: Sequence[int],
) -> list[Load]:
    """Combines all sizes; raises MptTrtError, naming the option, when the engine is too small."""
    for option, sizes in (
        ("batch_sizes", batch_sizes),
        ("prompt_lens", prompt_lens),
        ("output_lens", output_lens),
    ):
        if min(sizes) < 1:
            raise MptTrtError(f"--{option} = {min(sizes)}: at least 1 is required")
    if max(batch_sizes) > model.max_batch_size:
        raise MptTrtError(
            f"--batch_sizes = {max(batch_sizes)}: the engine has {model.max_batch_size} rows"
        )
    if max(prompt_lens) + max(output_lens) > model.capacity:
        raise MptTrtError(
            f"--prompt_lens = {max(prompt_lens)} and --output_lens = {max(output_lens)}: a row of "
            f"the engine holds {model.capacity} tokens; lower one of them"
        )
    return [Load(*sizes) for sizes in itertools.product(batch_sizes, prompt_lens, output_lens)]


def measure_load(model: StepModel, load: Load, rounds: int) -> LoadSpeed:
    """Generates greedily from random prompts, `rounds` times after a warm-up."""
    numbers = np.random.default_rng(0)
    prompts = numbers.integers(0, model.vocab_size, (load.batch_size, load.prompt_len)).tolist()
    # No end token, so that every row gets all its tokens.
    config = GenerationConfig(load.new_tokens, end_ids=(), pad_id=0)
    measured = [_times(model, prompts, config) for _ in range(rounds + 1)][1:]
    gaps = [gap for times in measured for gap in np.diff(times).tolist()]
    num_tokens = load.batch_size * load.new_tokens
    return LoadSpeed(
        load=load,
        first_token_s=Spread.of([times[0] for times in measured]),
        between_tokens_s=Spread.of(gaps) if gaps else None,
        tokens_per_s=statistics.median(num_tokens / times[-1] for times in measured),
        rounds=rounds,
    )


def _times(model: StepModel, prompts: list[list[int]], config: GenerationConfig) -> list[float]:
    """Seconds from the start to each token."""
    started = time.perf_counter()
    return [time.perf_counter() - started for _ in generate_steps(model, prompts, config)]


def write_throughput(result: ThroughputResult, target: Path, inputs: Iterable[Path] = ()) -> None:
    """Writes the result as JSON. inputs: see `replace_file`."""
    write_json(target, asdict(result), inputs)


def read_throughput(path: Path) -> ThroughputResult:
    """Reads a result; raises MptTrtError when `write_throughput` did not write the file."""
    return read_result(path, ThroughputResult, "a throughput measurement")
