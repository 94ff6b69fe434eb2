"""Records greedy generations of an engine: tokens, logits and speed."""

from __future__ import annotations

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

# Time of generation after which no further round is measured.
MOST_SECONDS = 120.0


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
    engine: LoadedEngine, prompt: list[int], max_new_tokens: int, rounds: int = 1
) -> RecordedGeneration:
    """Continues `prompt` greedily, as a user would, and collects the logits at every position.

    The continuation's logits are those of the generation itself (prefill, then single tokens); the
    prompt's are read in a second pass. rounds: generations over which speed is measured.
    """
    recorders = _generations(engine, [prompt], max_new_tokens, rounds)
    first = recorders[0]
    generated = first.tokens
    prompt_logits = all_logits(engine, prompt)[:-1]
    return RecordedGeneration(
        tokens=[*prompt, *generated],
        prompt_len=len(prompt),
        logits=np.concatenate([prompt_logits, *first.logits]),
        speed=_speed(recorders, len(prompt), len(generated)),
    )


def measure_speed(
    engine: LoadedEngine, prompt: list[int], max_new_tokens: int, rounds: int, num_rows: int = 1
) -> Speed:
    """Continues `prompt` greedily `rounds` times after a warm-up, in `num_rows` rows at a time.

    Speeds count the tokens of all rows.
    """
    recorders = _generations(engine, [prompt] * num_rows, max_new_tokens, rounds)
    return _speed(recorders, num_rows * len(prompt), num_rows * max_new_tokens, num_rows)


def _generations(
    engine: LoadedEngine, prompts: list[list[int]], max_new_tokens: int, rounds: int
) -> list[_Recorder]:
    """Records the same generation several times; stops early when it takes minutes."""
    # No end token, so that every requested position is compared.
    config = GenerationConfig(max_new_tokens=max_new_tokens, end_ids=(), pad_id=0)
    generate(engine.model, prompts, config)  # warm-up: the first run includes set-up
    recorders: list[_Recorder] = []
    while len(recorders) < rounds and not _takes_minutes(engine, recorders):
        recorder = _Recorder(engine.model, keeps_logits=not recorders)
        recorder.tokens = list(generate(recorder, prompts, config)[0][0].tokens)
        recorders.append(recorder)
    return recorders


def _takes_minutes(engine: LoadedEngine, recorders: list[_Recorder]) -> bool:
    """Returns whether another round would take too long; the same on all ranks."""
    is_long = sum(recorder.seconds for recorder in recorders) > MOST_SECONDS
    ranks = engine.communicator
    return is_long if ranks is None or not recorders else any(ranks.exchange(is_long))


def _speed(
    recorders: list[_Recorder], prompt_tokens: int, new_tokens: int, num_rows: int = 1
) -> Speed:
    """Computes speeds; prefill gives the first new token of each row."""
    prefill, decode = zip(
        *(recorder.speeds(prompt_tokens, new_tokens - num_rows) for recorder in recorders),
        strict=True,
    )
    return Speed.of_rounds(prefill, decode)


class _Recorder:
    """A StepModel that forwards calls to another and keeps the logits and times of steps.

    It is not a `GreedyModel`, so that every step returns logits.
    """

    def __init__(self, model: StepModel, keeps_logits: bool):
        self.logits: list[NDArray[np.float32]] = []
        self.tokens: list[int] = []
        self._keeps_logits = keeps_logits
        self._model = model
        self.vocab_size, self.capacity = model.vocab_size, model.capacity
        self.max_batch_size, self.max_step_tokens = model.max_batch_size, model.max_step_tokens
        self.start, self.reorder = model.start, model.reorder
        self._seconds: list[float] = []
        self._prefill_steps = 0
        self._has_logits = False

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_positions: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        started = time.perf_counter()
        logits = self._model.step(input_ids, write_positions, logit_positions)
        self._seconds.append(time.perf_counter() - started)
        if not self._has_logits:
            self._prefill_steps += 1
        if len(logits):
            self._has_logits = True
            # The model may write the next step's logits to the same memory.
            self.logits += [logits.copy()] if self._keeps_logits else []
        return logits

    @property
    def seconds(self) -> float:
        """Time of all steps."""
        return sum(self._seconds)

    def speeds(self, prompt_tokens: int, decoded_tokens: int) -> tuple[float, float]:
        """Tokens per second of prefill, and of decoding after it."""
        prefill, decode = (
            max(sum(part), 1e-9)
            for part in (
                self._seconds[: self._prefill_steps],
                self._seconds[self._prefill_steps :],
            )
        )
        return prompt_tokens / prefill, decoded_tokens / decode
