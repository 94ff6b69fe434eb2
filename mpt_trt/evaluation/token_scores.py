"""Log-probabilities of given tokens, of many sequences at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.load import LoadedEngine
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.logits import LOGITS_BYTES
from mpt_trt.generation.logits import log_softmax, require_finite
from mpt_trt.system.progress_lines import Advance, no_progress

# Maximum number of float64 log-probabilities in memory.
CHUNK_VALUES = 1 << 21


@dataclass(frozen=True)
class Passage:
    """A sequence of tokens, of which those from index `first` on are scored; first >= 1."""

    tokens: list[int]
    first: int


@dataclass(frozen=True)
class TokenScores:
    """Scores of a passage's tokens from `first` on.

    log_probs: natural log-probability of each, given all tokens before it, `[scored]`. is_top:
    whether it is the most likely token, `[scored]`.
    """

    log_probs: NDArray[np.float64]
    is_top: NDArray[np.bool_]

    @property
    def total(self) -> float:
        """Natural log-probability of all scored tokens together."""
        return float(self.log_probs.sum())


def score_passages(
    engine: LoadedEngine, passages: Sequence[Passage], advance: Advance = no_progress
) -> list[TokenScores]:
    """Scores passages, as many at a time as the engine's cache has rows.

    Passages of similar length share a batch. Every rank takes part. advance: counts passages.

    Raises MptTrtError when a passage is longer than the cache, and FloatingPointError when a logit
    is not finite.
    """
    for passage in passages:
        if len(passage.tokens) - 1 > engine.model.capacity:
            raise MptTrtError(
                f"a text of {len(passage.tokens)} tokens does not fit the engine, whose cache "
                f"holds {engine.model.capacity}; build it with a larger max_input_len"
            )
    order = sorted(range(len(passages)), key=lambda index: -len(passages[index].tokens))
    rows = min(engine.model.max_batch_size, _logits_per_step(engine))
    found: dict[int, TokenScores] = {}
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        scores = _score_batch(engine, [passages[index] for index in batch])
        found |= dict(zip(batch, scores, strict=True))
        advance(len(batch))
    return [found[index] for index in range(len(passages))]


def _logits_per_step(engine: LoadedEngine) -> int:
    limit = max(1, LOGITS_BYTES // (np.float32().itemsize * engine.model.vocab_size))
    return limit if engine.max_logits is None else min(limit, engine.max_logits)


def _score_batch(engine: LoadedEngine, passages: Sequence[Passage]) -> list[TokenScores]:
    """Scores passages side by side; shorter ones are padded on the right, where nobody looks."""
    shape = len(passages), max(len(passage.tokens) for passage in passages) - 1
    inputs, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    wanted = np.zeros(shape, np.bool_)
    for row, passage in enumerate(passages):
        length = len(passage.tokens) - 1
        inputs[row, :length], targets[row, :length] = passage.tokens[:-1], passage.tokens[1:]
        wanted[row, passage.first - 1 : length] = True
    log_probs, is_top = np.zeros(shape), np.zeros(shape, np.bool_)
    engine.model.start(len(passages))
    for part in _steps(wanted, engine.model.max_step_tokens, _logits_per_step(engine)):
        places = np.argwhere(wanted[:, part])
        starts = np.full(len(passages), part.start, np.int64)
        logits = engine.model.step(inputs[:, part], starts, places)
        rows, columns = places[:, 0], places[:, 1] + part.start
        chosen = targets[rows, columns]
        log_probs[rows, columns] = _log_probs_of(logits, chosen)
        is_top[rows, columns] = logits.argmax(axis=-1) == chosen
    return [
        TokenScores(log_probs[row, wanted[row]], is_top[row, wanted[row]])
        for row in range(len(passages))
    ]


def _steps(wanted: NDArray[np.bool_], max_tokens: int, max_logits: int) -> Iterator[slice]:
    """Divides the positions of `[rows, length]` into as few steps as the limits allow."""
    before = np.concatenate([[0], np.cumsum(wanted.sum(axis=0))])
    length, start = wanted.shape[1], 0
    while start < length:
        most = int(np.searchsorted(before, before[start] + max_logits, side="right")) - 1
        stop = max(start + 1, min(start + max_tokens, most, length))
        yield slice(start, stop)
        start = stop


def _log_probs_of(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log-probability of one token per row, `[rows]`, from logits `[rows, vocab]`."""
    size = max(1, CHUNK_VALUES // logits.shape[-1])
    found = np.empty(len(tokens))
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        wide = log_softmax(require_finite(logits[part]).astype(np.float64))
        found[part] = wide[np.arange(len(wide)), tokens[part]]
    return found
