"""Beam search, which extends several hypotheses per prompt together.

In shapes, `batch` is the number of prompts, `beams` that of running hypotheses per prompt, `width`
that of an array's hypotheses per prompt, and `vocab` the size of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.generation.config import Generated, GenerationConfig
from mpt_trt.generation.logits import log_softmax, penalize_repetition
from mpt_trt.generation.stepping import PromptBatch, Stepper, is_end


@dataclass(frozen=True)
class _Hypotheses:
    """`width` sequences of new tokens for each prompt, best first."""

    tokens: NDArray[np.int64]  # [batch, width, max_new_tokens]
    lengths: NDArray[np.int64]  # [batch, width]
    log_probs: NDArray[np.float64]  # [batch, width, max_new_tokens], from the model
    scores: NDArray[np.float32]  # [batch, width], for ranking; -inf: no hypothesis

    @classmethod
    def empty(cls, batch: int, width: int, max_new_tokens: int, score: float) -> _Hypotheses:
        """Makes hypotheses without tokens, all with the same score."""
        return cls(
            tokens=np.zeros((batch, width, max_new_tokens), dtype=np.int64),
            lengths=np.zeros((batch, width), dtype=np.int64),
            log_probs=np.zeros((batch, width, max_new_tokens)),
            scores=np.full((batch, width), score, dtype=np.float32),
        )

    def take(self, index: NDArray[np.int64]) -> _Hypotheses:
        """Selects the hypotheses at `index`, `[batch, new width]`."""
        return _Hypotheses(
            tokens=np.take_along_axis(self.tokens, index[:, :, None], axis=1),
            lengths=np.take_along_axis(self.lengths, index, axis=1),
            log_probs=np.take_along_axis(self.log_probs, index[:, :, None], axis=1),
            scores=np.take_along_axis(self.scores, index, axis=1),
        )

    def merged(self, other: _Hypotheses) -> _Hypotheses:
        """Joins these hypotheses with others, prompt by prompt."""
        return _Hypotheses(
            tokens=np.concatenate([self.tokens, other.tokens], axis=1),
            lengths=np.concatenate([self.lengths, other.lengths], axis=1),
            log_probs=np.concatenate([self.log_probs, other.log_probs], axis=1),
            scores=np.concatenate([self.scores, other.scores], axis=1),
        )

    def rescored(self, scores: NDArray[np.float32]) -> _Hypotheses:
        """Returns the same hypotheses with other scores."""
        return _Hypotheses(self.tokens, self.lengths, self.log_probs, scores)


def beam_search(stepper: Stepper, config: GenerationConfig) -> list[list[Generated]]:
    """Extends `num_beams` running hypotheses per prompt and keeps the same number of finished ones.

    Each step extends the running hypotheses and moves ended ones to the finished ones. A prompt is
    done when its best running hypothesis, at its current length, does not beat its worst finished
    one.
    """
    batch, beams, most = len(stepper.prompts.ids), config.num_beams, config.max_new_tokens
    # Starts with one empty beam per prompt, which the first step multiplies.
    running = _Hypotheses.empty(batch, 1, most, score=0.0)
    finished = _Hypotheses.empty(batch, beams, most, score=-np.inf)
    is_open = np.ones(batch, dtype=bool)
    logits = stepper.prefill()
    for step in range(most):
        candidates, parents = _extended(running, logits, stepper.prompts, config)
        ended = is_end(candidates.tokens[:, :, step], config) | (step + 1 == most)
        scale = float(step + 1) ** config.length_penalty
        finished = _with_finished(finished, candidates, ended & is_open[:, None], scale)
        going_on = candidates.rescored(np.where(ended, -np.inf, candidates.scores))
        best = _top(going_on.scores, beams)
        rows = _cache_rows(np.take_along_axis(parents, best, axis=1), running.scores.shape[1])
        num_rows, running = running.scores.size, going_on.take(best)
        is_open = is_open & (running.scores[:, 0] / scale > finished.scores.min(axis=1))
        if step + 1 == most or not is_open.any():
            break
        stepper.reorder(rows, num_rows)
        logits = stepper.decode(
            running.tokens[:, :, step].reshape(-1), step + 1, int(is_open.sum()) * beams
        )
    return _ranked(finished)


def _extended(
    running: _Hypotheses,
    logits: NDArray[np.float32],
    prompts: PromptBatch,
    config: GenerationConfig,
) -> tuple[_Hypotheses, NDArray[np.int64]]:
    """Returns the best `num_candidates` extensions by a token, best first, and their beams.

    Beams are numbered within the prompt, `[batch, num_candidates]`.
    """
    batch, width = running.scores.shape
    step = int(running.lengths[0, 0])
    log_probs = log_softmax(logits)
    vocab = log_probs.shape[-1]
    seen = np.concatenate(
        [
            np.repeat(prompts.vocabulary(), width, axis=0),
            running.tokens[:, :, :step].reshape(batch * width, step),
        ],
        axis=1,
    )
    gains = penalize_repetition(log_probs, seen, config.repetition_penalty)
    totals = gains.reshape(batch, width, vocab) + running.scores[:, :, None]
    flat = totals.reshape(batch, width * vocab)
    best = _top(flat, config.num_candidates)
    parents, chosen = best // vocab, best % vocab
    extended = running.take(parents)
    extended.tokens[:, :, step] = chosen
    flat_log_probs = log_probs.reshape(batch, width * vocab)
    extended.log_probs[:, :, step] = np.take_along_axis(flat_log_probs, best, axis=1)
    return _Hypotheses(
        tokens=extended.tokens,
        lengths=extended.lengths + 1,
        log_probs=extended.log_probs,
        scores=np.take_along_axis(flat, best, axis=1),
    ), parents


def _with_finished(
    finished: _Hypotheses,
    candidates: _Hypotheses,
    ended: NDArray[np.bool_],
    scale: float,
) -> _Hypotheses:
    """Returns the best of the finished hypotheses and the candidates that `ended`.

    `finished` is `[batch, num_beams]`, `candidates` and `ended` are `[batch, num_candidates]`. Only
    the first `num_beams` candidates count, because the others would not have become beams. Their
    scores are divided by `scale`.
    """
    beams = finished.scores.shape[1]
    counts = ended & (np.arange(ended.shape[1]) < beams)
    both = finished.merged(
        candidates.rescored(np.where(counts, candidates.scores / scale, np.float32(-np.inf)))
    )
    return both.take(_top(both.scores, beams))


def _top(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Finds indices of the `count` highest scores of each row, highest first, `[batch, count]`."""
    some = np.sort(np.argpartition(-scores, count - 1, axis=-1)[:, :count], axis=-1)
    order = np.argsort(-np.take_along_axis(scores, some, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(some, order, axis=-1)


def _cache_rows(parents: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Converts beam numbers within each prompt, `[batch, beams]`, to cache rows `[batch * beams]`.

    Each prompt has `width` cache rows.
    """
    return (parents + width * np.arange(len(parents))[:, None]).reshape(-1)


def _ranked(finished: _Hypotheses) -> list[list[Generated]]:
    batch, beams = finished.scores.shape
    return [[_generated(finished, row, beam) for beam in range(beams)] for row in range(batch)]


def _generated(finished: _Hypotheses, row: int, beam: int) -> Generated:
    length = finished.lengths[row, beam]
    log_probs = finished.log_probs[row, beam, :length]
    return Generated(
        tokens=tuple(finished.tokens[row, beam, :length].tolist()),
        cumulative_log_prob=float(log_probs.sum()),
        log_probs=tuple(log_probs.tolist()),
        score=float(finished.scores[row, beam]),
    )
