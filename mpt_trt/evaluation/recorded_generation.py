"""Records greedy generations of an engine: tokens, logits and speed."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.interface import StepModel
from mpt_trt.engines.load import LoadedEngine
from mpt_trt.evaluation.logits import all_logits
from mpt_trt.evaluation.speed import Speed
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate


@dataclass(frozen=True)
class RecordedGeneration:
    """A greedy generation by an engine.

    tokens: prompt and continuation. prompt_len: tokens of the prompt. logits: float32 `[len(tokens)
    - 1, vocab]`, the engine's logits at every token except the last.
    """

    tokens: list[int]
    prompt_len: int
    logits: NDArray[np.float32]
    speed: Speed


def record_generation(
    engine: LoadedEngine, prompt: list[int], max_new_tokens: int
) -> RecordedGeneration:
    """Continues `prompt` greedily, as a user would, and collects the logits at every position.

    The continuation's logits are those of the generation itself (prefill, then single tokens); the
    prompt's are read in a second pass.
    """
    # No end token, so that every requested position is compared.
    config = GenerationConfig(max_new_tokens=max_new_tokens, end_ids=(), pad_id=0)
    generate(engine.model, [prompt], config)  # warm-up: the first run includes set-up
    recorder = _Recorder(engine.model)
    generated = generate(recorder, [prompt], config)[0][0].tokens
    prompt_logits = all_logits(engine, prompt)[:-1]
    return RecordedGeneration(
        tokens=[*prompt, *generated],
        prompt_len=len(prompt),
        logits=np.concatenate([prompt_logits, *recorder.logits]),
        speed=recorder.speed(len(prompt), len(generated)),
    )


def measure_speed(
    engine: LoadedEngine, prompt: list[int], max_new_tokens: int, rounds: int
) -> Speed:
    """Continues `prompt` greedily `rounds` times after a warm-up; returns the median speeds."""
    config = GenerationConfig(max_new_tokens=max_new_tokens, end_ids=(), pad_id=0)
    generate(engine.model, [prompt], config)
    speeds = []
    for _ in range(rounds):
        recorder = _Recorder(engine.model)
        generate(recorder, [prompt], config)
        speeds.append(recorder.speed(len(prompt), max_new_tokens))
    return Speed(
        statistics.median(speed.prefill_tokens_per_s for speed in speeds),
        statistics.median(speed.decode_tokens_per_s for speed in speeds),
    )


class _Recorder:
    """A StepModel that forwards calls to another and keeps the logits and times of steps.

    It is not a `GreedyModel`, so that every step returns logits.
    """

    def __init__(self, model: StepModel):
        self.logits: list[NDArray[np.float32]] = []
        self._model = model
        self.vocab_size, self.capacity = model.vocab_size, model.capacity
        self.max_batch_size, self.max_step_tokens = model.max_batch_size, model.max_step_tokens
        self.start, self.reorder = model.start, model.reorder
        self._seconds: list[float] = []
        self._prefill_steps = 0

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_positions: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        started = time.perf_counter()
        logits = self._model.step(input_ids, write_positions, logit_positions)
        self._seconds.append(time.perf_counter() - started)
        if not self.logits:
            self._prefill_steps += 1
        self.logits += [logits] if len(logits) else []
        return logits

    def speed(self, prompt_len: int, new_tokens: int) -> Speed:
        """Speed of the recorded generation; prefill gives the first of its new tokens."""
        prefill, decode = (
            max(sum(part), 1e-9)
            for part in (
                self._seconds[: self._prefill_steps],
                self._seconds[self._prefill_steps :],
            )
        )
        return Speed(prompt_len / prefill, (new_tokens - 1) / decode)
