"""How far an engine is from the float32 reference, over a prompt and what it continues it with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.interface import StepModel
from mpt_trt.engines.load import LoadedEngine
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.generation.logits import log_softmax
from mpt_trt.workflow.settings import Tolerance

# Logits that a step may return; beyond it, larger steps are no faster.
LOGITS_BYTES = 1 << 27


@dataclass(frozen=True)
class Distance:
    """Distance of logits from the reference.

    max_abs: largest difference of a logit. mean_kl: mean over positions of
    KL(reference || engine), in nats. top1: share of positions with the same most likely token.
    positions: how many were compared.
    """

    max_abs: float
    mean_kl: float
    top1: float
    positions: int

    def violations(self, tolerance: Tolerance) -> list[str]:
        """What exceeds the tolerance, in words; empty when nothing does."""
        checks = (
            (self.max_abs <= tolerance.max_abs, f"max_abs {self.max_abs:.3g}", tolerance.max_abs),
            (self.mean_kl <= tolerance.mean_kl, f"mean_kl {self.mean_kl:.3g}", tolerance.mean_kl),
            (self.top1 >= tolerance.min_top1, f"top1 {self.top1:.3g}", tolerance.min_top1),
        )
        return [f"{found} (allowed {bound:g})" for is_fine, found, bound in checks if not is_fine]


@dataclass(frozen=True)
class RecordedGeneration:
    """One generation by an engine.

    tokens: prompt and continuation. logits: float32 `[len(tokens) - 1, vocab]`, the engine's at
    every token but the last. prompt_len: tokens of the prompt. Speeds in tokens per second.
    """

    tokens: list[int]
    prompt_len: int
    logits: NDArray[np.float32]
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Speed:
    """Of one sequence, in tokens per second: reading a prompt, and generating behind it."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def measure_distance(engine: NDArray[np.float32], reference: NDArray[np.float32]) -> Distance:
    """Compares logits `[positions, vocab]`."""
    log_p, log_q = (log_softmax(logits.astype(np.float64)) for logits in (reference, engine))
    kl = divergence(log_p, log_q)
    same = engine.argmax(axis=-1) == reference.argmax(axis=-1)
    return Distance(
        max_abs=float(np.abs(engine.astype(np.float64) - reference).max()),
        mean_kl=float(kl.mean()),
        top1=float(same.mean()),
        positions=len(engine),
    )


def divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) in nats, `[...]`, of natural log-probabilities `[..., vocab]`."""
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def record_generation(
    engine: LoadedEngine, prompt: list[int], max_new_tokens: int
) -> RecordedGeneration:
    """Continues `prompt` greedily, as a user would, and collects the logits of every position.

    The continuation's logits are those of the generation itself (prefill, then single tokens); the
    prompt's are read in a second pass.
    """
    # The end token is of no interest here: every asked-for position shall be compared.
    config = GenerationConfig(max_new_tokens=max_new_tokens, end_id=None, pad_id=0)
    generate(engine.model, [prompt], config)  # warm-up: first-time set-up is no part of the speed
    recorder = _Recorder(engine.model)
    generated = generate(recorder, [prompt], config)[0][0].tokens
    prompt_logits = all_logits(engine, prompt)[:-1]
    speed = recorder.speed(len(prompt), len(generated))
    return RecordedGeneration(
        tokens=[*prompt, *generated],
        prompt_len=len(prompt),
        logits=np.concatenate([prompt_logits, *recorder.logits]),
        prefill_tokens_per_s=speed.prefill_tokens_per_s,
        decode_tokens_per_s=speed.decode_tokens_per_s,
    )


def measure_speed(
    engine: LoadedEngine, prompt: list[int], max_new_tokens: int, rounds: int
) -> Speed:
    """Continues `prompt` greedily, `rounds` times after a warm-up; the medians."""
    config = GenerationConfig(max_new_tokens=max_new_tokens, end_id=None, pad_id=0)
    generate(engine.model, [prompt], config)
    found = []
    for _ in range(rounds):
        recorder = _Recorder(engine.model)
        generate(recorder, [prompt], config)
        found.append(recorder.speed(len(prompt), max_new_tokens))
    return Speed(
        statistics.median(speed.prefill_tokens_per_s for speed in found),
        statistics.median(speed.decode_tokens_per_s for speed in found),
    )


def all_logits(engine: LoadedEngine, tokens: list[int]) -> NDArray[np.float32]:
    """Logits of every token of one sequence, `[len(tokens), vocab]`."""
    sequences = np.array([tokens], np.int64)
    return np.concatenate([piece.logits[0] for piece in logits_in_pieces(engine, sequences)])


@dataclass(frozen=True)
class Piece:
    """Part of the logits of several sequences.

    sequences, positions: which ones. logits: float32 `[sequences, positions, vocab]`, only read,
    and not after the next step.
    """

    sequences: slice
    positions: slice
    logits: NDArray[np.float32]


def logits_in_pieces(engine: LoadedEngine, tokens: NDArray[np.int64]) -> Iterator[Piece]:
    """Logits of every token of `[sequences, seq]`, in as few steps as the engine's limits allow.

    An engine that returns one row of logits for each row of its cache is fed as many sequences at a
    time as it has rows, token by token: that many logits come from every step, of the shape that
    generation is fastest at.
    """
    limit = max(1, LOGITS_BYTES // (np.float32().itemsize * engine.model.vocab_size))
    if engine.max_logits is not None:
        limit = min(limit, engine.max_logits)
    rows = min(len(tokens), engine.model.max_batch_size, limit)
    length = min(engine.model.max_step_tokens, limit // rows)
    for first in range(0, len(tokens), rows):
        batch = slice(first, min(first + rows, len(tokens)))
        engine.model.start(batch.stop - batch.start)
        for start in range(0, tokens.shape[1], length):
            positions = slice(start, min(start + length, tokens.shape[1]))
            yield Piece(batch, positions, _step(engine.model, tokens[batch, positions], start))


def _step(model: StepModel, tokens: NDArray[np.int64], start: int) -> NDArray[np.float32]:
    """Logits of all tokens of a step that begins at cache position `start` in every row."""
    rows, length = tokens.shape
    every_token = np.argwhere(np.ones_like(tokens))
    logits = model.step(tokens, np.full(rows, start, np.int64), every_token)
    return logits.reshape(rows, length, -1)


@dataclass
class _Recorder:
    """A StepModel that passes everything on, and keeps logits and times of the steps."""

    model: StepModel
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    prefill_steps: int = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_positions: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        started = time.perf_counter()
        logits = self.model.step(input_ids, write_positions, logit_positions)
        self.seconds.append(time.perf_counter() - started)
        if not self.logits:
            self.prefill_steps += 1
        self.logits += [logits] if len(logits) else []
        return logits

    def speed(self, prompt_len: int, new_tokens: int) -> Speed:
        """Of the generation that was recorded; prefill gives the first of its new tokens."""
        prefill, decode = (
            max(sum(part), 1e-9)
            for part in (self.seconds[: self.prefill_steps], self.seconds[self.prefill_steps :])
        )
        return Speed(prompt_len / prefill, (new_tokens - 1) / decode)
