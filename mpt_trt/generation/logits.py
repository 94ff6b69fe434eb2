"""Arithmetic on logits: log-probabilities, the repetition penalty, and the filters of sampling."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mpt_trt.generation.config import TopLogProbs

Float = TypeVar("Float", bound=np.floating)


def require_finite(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the logits `[..., vocab]` if each row has a finite maximum.

    A NaN anywhere makes the maximum NaN.

    Raises:
        FloatingPointError: a row has no finite maximum.
    """
    require_finite_rows(logits.max(axis=-1))
    return logits


def require_finite_rows(values: NDArray[np.floating] | np.floating) -> None:
    """Raises FloatingPointError, naming the first bad row, unless all values are finite."""
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values))
        raise FloatingPointError(
            f"the logits of row {bad[0]} are not finite; the numbers inside the network overflow"
            " its data type: build in a wider one (bf16 or fp32)"
        )


def log_softmax(logits: NDArray[Float]) -> NDArray[Float]:
    """Computes natural log-probabilities, `[..., vocab]`, in the type of the logits."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def top_log_probs(log_probs: NDArray[np.float32], count: int) -> list[TopLogProbs]:
    """Finds the `count` most likely tokens of each row of log-probabilities, `[rows, vocab]`."""
    count = min(count, log_probs.shape[-1])
    if not count:
        return [()] * len(log_probs)
    best = np.argpartition(log_probs, -count, axis=-1)[:, -count:]
    found = []
    for row, tokens in zip(log_probs, best, strict=True):
        # Tokens that are equally likely come in the order of their ids.
        order = np.lexsort((tokens, -row[tokens]))
        found.append(tuple((int(token), float(row[token])) for token in tokens[order]))
    return found


def penalize_repetition(
    scores: NDArray[np.float32], seen: NDArray[np.int64], penalty: float
) -> NDArray[np.float32]:
    """Lowers scores of tokens that occurred: score * penalty if negative, else score / penalty.

    Args:
        scores: `[..., vocab]`, not modified.
        seen: `[..., n]` token ids; one that occurs twice counts once.
        penalty: above 1 to penalize, 1 for no effect.
    """
    if penalty == 1.0:
        return scores
    old = np.take_along_axis(scores, seen, axis=-1)
    penalized = scores.copy()
    np.put_along_axis(penalized, seen, np.where(old < 0, old * penalty, old / penalty), axis=-1)
    return penalized


def keep_top_k(scores: NDArray[Float], top_k: int) -> NDArray[Float]:
    """Sets all scores except the `top_k` highest of each row, `[..., vocab]`, to -inf.

    Scores equal to the last one stay. 0: all stay.
    """
    vocab = scores.shape[-1]
    if not 0 < top_k < vocab:
        return scores
    lowest = np.partition(scores, vocab - top_k, axis=-1)[..., vocab - top_k, None]
    return np.where(scores < lowest, -np.inf, scores)


def keep_top_p(scores: NDArray[Float], top_p: float, rest: float = 0.0) -> NDArray[Float]:
    """Sets all tokens except the fewest most likely ones with total probability `top_p` to -inf.

    A token is removed if it and all less likely ones together have a probability of at most 1 -
    top_p; among equals, the lower id counts as less likely. The most likely token always stays. 0
    or 1: all stay.

    Args:
        scores: `[..., vocab]`; probabilities are their softmax.
        top_p: the total probability, 0 to 1.
        rest: sum of exp(score - highest score) of less likely tokens that `scores` lacks.
    """
    if not 0 < top_p < 1:
        return scores
    # Sorting the values, and ids only for ties, is faster than a stable argsort.
    ascending = np.sort(scores, axis=-1)
    weights = np.exp(ascending - ascending[..., -1:])
    total = rest + weights.sum(axis=-1, keepdims=True)
    tail = rest / total + np.cumsum(weights / total, axis=-1)
    num_dropped = np.minimum((tail <= 1 - top_p).sum(axis=-1, keepdims=True), scores.shape[-1] - 1)
    lowest = np.take_along_axis(ascending, num_dropped, axis=-1)
    below, ties = scores < lowest, scores == lowest
    num_ties_dropped = num_dropped - below.sum(axis=-1, keepdims=True)
    dropped = below | (ties & (np.cumsum(ties, axis=-1) <= num_ties_dropped))
    return np.where(dropped, -np.inf, scores)
