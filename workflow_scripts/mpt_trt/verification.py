"""How far an engine is from the float32 reference, over a prompt and what it continues it with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.loading import LoadedEngine
from mpt_trt.generation import GenerationConfig, StepModel, generate, log_softmax
from mpt_trt.settings import Tolerance


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
class Trial:
    """One generation by an engine.

    tokens: prompt and continuation. logits: float32 `[len(tokens) - 1, vocab]`, the engine's at
    every token but the last. prompt_len: tokens of the prompt. Speeds in tokens per second.
    """

    tokens: list[int]
    prompt_len: int
    logits: NDArray[np.float32]
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def distance(engine: NDArray[np.float32], reference: NDArray[np.float32]) -> Distance:
    """Compares logits `[positions, vocab]`."""
    log_p, log_q = (log_softmax(logits.astype(np.float64)) for logits in (reference, engine))
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    same = engine.argmax(axis=-1) == reference.argmax(axis=-1)
    return Distance(
        max_abs=float(np.abs(engine.astype(np.float64) - reference).max()),
        mean_kl=float(kl.mean()),
        top1=float(same.mean()),
        positions=len(engine),
    )


def run_trial(engine: LoadedEngine, prompt: list[int], max_new_tokens: int) -> Trial:
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
    seconds = np.array(recorder.seconds)
    return Trial(
        tokens=[*prompt, *generated],
        prompt_len=len(prompt),
        logits=np.concatenate([prompt_logits, *recorder.logits]),
        prefill_tokens_per_s=len(prompt) / max(seconds[: recorder.prefill_steps].sum(), 1e-9),
        decode_tokens_per_s=(len(generated) - 1)
        / max(seconds[recorder.prefill_steps :].sum(), 1e-9),
    )


def all_logits(engine: LoadedEngine, tokens: list[int]) -> NDArray[np.float32]:
    """Logits of every token of one sequence, `[len(tokens), vocab]`.

    Fed in pieces as long as the engine's limits allow, token by token at the least.
    """
    piece = engine.model.max_step_tokens
    if engine.max_logits is not None:
        piece = min(piece, engine.max_logits)
    engine.model.start(1)
    found = []
    for start in range(0, len(tokens), piece):
        part = np.array([tokens[start : start + piece]], np.int64)
        positions = np.array([(0, index) for index in range(part.shape[1])], np.int64)
        found.append(engine.model.step(part, np.array([start], np.int64), positions))
    return np.concatenate(found)


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
