"""The repetition penalty and the filters against transformers' logits processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mpt_trt.generation.generate import generate
from mpt_trt.generation.logits import keep_top_k, keep_top_p, penalize_repetition
from support.generation import TableModel, greedy


def score_rows(min_side: int = 1) -> st.SearchStrategy[np.ndarray]:
    """Scores in which ties are common."""
    return arrays(
        np.float64,
        array_shapes(min_dims=2, max_dims=2, min_side=min_side, max_side=12),
        elements=st.one_of(st.integers(-3, 3).map(float), st.floats(-20, 20)),
    )


def warped(processor: object, scores: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    """Applies a logits processor of transformers to the scores."""
    seen = None if ids is None else torch.from_numpy(ids)
    return processor(seen, torch.from_numpy(scores.copy())).numpy()


@settings(max_examples=150, deadline=None)
@given(score_rows(), st.integers(1, 15))
def test_top_k_keeps_what_transformers_keeps(scores: np.ndarray, top_k: int) -> None:
    np.testing.assert_array_equal(
        keep_top_k(scores, top_k), warped(TopKLogitsWarper(top_k), scores)
    )


@settings(max_examples=250, deadline=None)
@given(score_rows(), st.floats(0.01, 0.99))
def test_top_p_keeps_what_transformers_keeps(scores: np.ndarray, top_p: float) -> None:
    tails = np.sort(scores, axis=-1)
    tails = np.cumsum(np.exp(tails) / np.exp(tails).sum(axis=-1, keepdims=True), axis=-1)
    # At the boundary itself rounding decides.
    assume((np.abs(tails - (1 - top_p)) > 1e-12).all())
    ours = keep_top_p(scores, top_p)
    reference = warped(TopPLogitsWarper(top_p), scores)
    # Sorted, since which of several equal scores goes is up to the sort.
    np.testing.assert_array_equal(np.sort(ours, axis=-1), np.sort(reference, axis=-1))
    assert ((ours == scores) | (ours == -np.inf)).all()


def test_top_p_drops_the_lower_ids_of_equals() -> None:
    scores = np.log([[0.1, 0.2, 0.2, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25, 1e-9]])
    kept = [np.flatnonzero(row > -np.inf).tolist() for row in keep_top_p(scores, 0.6)]
    assert kept == [[2, 3, 4], [1, 2, 3]]
    assert [np.flatnonzero(row > -np.inf).tolist() for row in keep_top_p(scores, 0.01)] == [
        [3],
        [3],
    ]


@settings(max_examples=100, deadline=None)
@given(score_rows(), st.floats(0.1, 5), st.data())
def test_repetition_penalty_is_that_of_transformers(
    scores: np.ndarray, penalty: float, data: st.DataObject
) -> None:
    rows, vocab = scores.shape
    seen = data.draw(arrays(np.int64, (rows, 7), elements=st.integers(0, vocab - 1)))
    before = scores.copy()
    ours = penalize_repetition(scores, seen, penalty)
    reference = warped(RepetitionPenaltyLogitsProcessor(penalty), scores, seen)
    np.testing.assert_allclose(ours, reference, rtol=1e-15)
    np.testing.assert_array_equal(scores, before)


@given(score_rows())
def test_filters_that_are_off_keep_all(scores: np.ndarray) -> None:
    for kept in (keep_top_k(scores, 0), keep_top_p(scores, 0.0), keep_top_p(scores, 1.0)):
        np.testing.assert_array_equal(kept, scores)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_logits_that_are_no_numbers_are_refused(bad: float, num_beams: int) -> None:
    table = np.zeros((5, 5))
    table[3, 1] = bad
    with pytest.raises(FloatingPointError, match=r"^the logits of row 1 are not finite"):
        generate(TableModel(table), [[2], [3]], greedy(end_ids=(), num_beams=num_beams))


def test_logits_that_overflow_in_decode_are_refused() -> None:
    table = np.eye(5)[[1, 2, 3, 3, 4]] * 9
    table[3] = np.nan
    with pytest.raises(FloatingPointError, match=r"^the logits of row 0 are not finite"):
        generate(TableModel(table), [[0]], greedy(end_ids=()))
