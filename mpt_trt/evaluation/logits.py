"""Logits of an engine at every token of given sequences, and their distance from the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.interface import StepModel
from mpt_trt.engines.load import LoadedEngine
from mpt_trt.evaluation.distance import Distance
from mpt_trt.generation.logits import log_softmax

# Logits that a step may return; beyond it, larger steps are no faster.
LOGITS_BYTES = 1 << 27


def measure_distance(engine: NDArray[np.float32], reference: NDArray[np.float32]) -> Distance:
    """Compares logits `[positions, vocab]`."""
    wide = engine.astype(np.float64)
    kl = divergence(log_softmax(reference.astype(np.float64)), log_softmax(wide))
    same = engine.argmax(axis=-1) == reference.argmax(axis=-1)
    return Distance(
        max_abs=float(np.abs(wide - reference).max()),
        mean_kl=float(kl.mean()),
        top1=float(same.mean()),
        positions=len(engine),
    )


def divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) in nats, `[...]`, of natural log-probabilities `[..., vocab]`."""
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def all_logits(engine: LoadedEngine, tokens: list[int]) -> NDArray[np.float32]:
    """Logits at every token of one sequence, `[len(tokens), vocab]`."""
    sequences = np.array([tokens], np.int64)
    return np.concatenate([piece.logits[0] for piece in logits_in_pieces(engine, sequences)])


@dataclass(frozen=True)
class LogitsPiece:
    """Part of the logits of several sequences.

    sequences, positions: which ones. logits: float32 `[sequences, positions, vocab]`, not to be
    written to, nor read after the next step.
    """

    sequences: slice
    positions: slice
    logits: NDArray[np.float32]


def logits_in_pieces(engine: LoadedEngine, tokens: NDArray[np.int64]) -> Iterator[LogitsPiece]:
    """Logits at every token of `[sequences, seq]`, in as few steps as the engine's limits allow.

    An engine that returns one row of logits for each row of its cache reads as many sequences at a
    time as it has rows, token by token: every step returns that many logits, in the shape that
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
            logits = _step(engine.model, tokens[batch, positions], start)
            yield LogitsPiece(batch, positions, logits)


def _step(model: StepModel, tokens: NDArray[np.int64], start: int) -> NDArray[np.float32]:
    """Logits at all tokens of a step that begins at cache position `start` in every row."""
    rows, length = tokens.shape
    every_token = np.argwhere(np.ones_like(tokens))
    logits = model.step(tokens, np.full(rows, start, np.int64), every_token)
    return logits.reshape(rows, length, -1)
