"""Logits of an engine at every token of given sequences, and their divergence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.interface import StepModel
from mpt_trt.engines.load import LoadedEngine
from mpt_trt.generation.logits import log_softmax

# Maximum number of logits per step; larger steps are not faster.
LOGITS_BYTES = 1 << 27


def mean_divergence(reference: NDArray, engine: NDArray) -> float:
    """Mean over positions of KL(reference || engine) in nats, of logits `[positions, vocab]`."""
    log_p, log_q = (log_softmax(logits.astype(np.float64)) for logits in (reference, engine))
    return float(divergence(log_p, log_q).mean())


def divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes KL(p || q) in nats, `[...]`, from natural log-probabilities `[..., vocab]`."""
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def all_logits(engine: LoadedEngine, tokens: list[int]) -> NDArray[np.float32]:
    """Computes logits at every token of one sequence, `[len(tokens), vocab]`."""
    sequences = np.array([tokens], np.int64)
    pieces = logits_in_pieces(engine, sequences)
    return np.concatenate([piece.logits[0].copy() for piece in pieces])


@dataclass(frozen=True)
class LogitsPiece:
    """Part of the logits of several sequences.

    sequences, positions: their indices. logits: float32 `[sequences, positions, vocab]`; must not
    be written to, or read after the next step.
    """

    sequences: slice
    positions: slice
    logits: NDArray[np.float32]


def logits_in_pieces(engine: LoadedEngine, tokens: NDArray[np.int64]) -> Iterator[LogitsPiece]:
    """Yields logits at every token of `[sequences, seq]`, in as few steps as the limits allow.

    An engine that returns one row of logits per row of its cache reads one sequence per row, token
    by token, so every step returns a full set of logits in the fastest shape.
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
    """Computes logits at all tokens of a step that starts at cache position `start`."""
    rows, length = tokens.shape
    every_token = np.argwhere(np.ones_like(tokens))
    logits = model.step(tokens, np.full(rows, start, np.int64), every_token)
    return logits.reshape(rows, length, -1)
