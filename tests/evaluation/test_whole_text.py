"""Perplexity of a whole text, against transformers on the same windows, and the windows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MptForCausalLM

from mpt_trt.api.text import EngineText
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.engines.load import LoadedEngine, load_engine
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.token_scores import Passage, score_passages
from mpt_trt.evaluation.whole_text import (
    measure_text,
    rolling_windows,
    text_windows,
    whole_text_of,
    window_length_of,
)
from support.demo import MODEL
from tools.demo_facts import text_scores

TEXT = (MODEL / "heldout.txt").read_text(encoding="utf-8")


@given(st.integers(1, 90), st.integers(2, 40))
def test_windows_predict_every_token_once(size: int, length: int) -> None:
    tokens, prefix = list(range(1, size + 1)), 0
    windows = list(rolling_windows(tokens, prefix, length))
    assert [token for window in windows for token in window.tokens[window.first :]] == tokens
    for window in windows:
        assert len(window.tokens) <= length + 1 and window.first >= 1
        # Each is a part of the text, with the prefix before it.
        assert window.tokens == list(range(window.tokens[0], window.tokens[-1] + 1))
    # All but a short text's are full, and all but the last predict as much as they can.
    if size >= length:
        assert all(len(window.tokens) == length + 1 for window in windows)
    assert all(window.first == 1 for window in windows[:-1])


@pytest.fixture(scope="module")
def engine(demo_engine: Path) -> LoadedEngine:
    return load_engine(demo_engine, "onnxruntime", num_threads=1)


@pytest.fixture(scope="module")
def model() -> MptForCausalLM:
    return MptForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32).eval()


def expected_scores(model: MptForCausalLM, passage: Passage) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        logits = model(torch.tensor([passage.tokens[:-1]])).logits[0].double()
    targets = torch.tensor(passage.tokens[1:])
    log_probs = torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]
    is_top = logits.argmax(-1) == targets
    return log_probs[passage.first - 1 :].numpy(), is_top[passage.first - 1 :].numpy()


@pytest.mark.parametrize("max_logits", [None, 1, 4, 7])
def test_scores_of_passages_of_many_lengths(
    engine: LoadedEngine, model: MptForCausalLM, max_logits: int | None
) -> None:
    """4 rows at a time, steps of 32 tokens, and as few logits per step as an engine may give."""
    ids = read_tokenizer(MODEL).encode(TEXT[:3000])
    shapes = [(2, 1), (97, 1), (40, 39), (33, 7), (64, 1), (5, 4), (90, 60), (3, 1), (50, 50)]
    passages = [
        Passage(ids[i : i + length + (first == length)], first)
        for i, (length, first) in enumerate(shapes)
    ]
    scores = score_passages(replace(engine, max_logits=max_logits), passages)
    for passage, found in zip(passages, scores, strict=True):
        log_probs, is_top = expected_scores(model, passage)
        np.testing.assert_allclose(found.log_probs, log_probs, atol=1e-4)
        np.testing.assert_array_equal(found.is_top, is_top)


def test_passages_that_do_not_fit_are_refused(engine: LoadedEngine) -> None:
    with pytest.raises(MptTrtError, match="a text of 98 tokens does not fit the engine, whose "):
        score_passages(engine, [Passage([1] * 98, 1)])


def test_perplexities_are_those_of_transformers(
    engine: LoadedEngine, model: MptForCausalLM, demo_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = EngineText.read(demo_engine, engine.manifest).require_tokenizer()
    assert window_length_of(engine) == 96
    monkeypatch.setattr("tools.demo_facts.WINDOW", 96)
    text = TEXT[:2000]
    with torch.inference_mode():
        expected = text_scores(model, tokenizer.backend, text)
    found = measure_text(engine, text, tokenizer, 96)
    assert found.word_perplexity == pytest.approx(expected["word_perplexity"], rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    assert found.tokens == len(tokenizer.encode(text)) and found.bytes == 2000


def test_figures() -> None:
    found = whole_text_of(nats=math.log(2) * 12, tokens=5, text="ä b\n\nc", window_length=8)
    assert (found.words, found.bytes) == (3, 7)
    assert found.word_perplexity == pytest.approx(16)
    assert found.bits_per_byte == pytest.approx(12 / 7)
    assert found.byte_perplexity == pytest.approx(2 ** (12 / 7))


def test_a_perplexity_beyond_all_numbers_is_none() -> None:
    found = whole_text_of(nats=800.0, tokens=5, text="a" * 1000, window_length=8)
    assert found.word_perplexity is None
    assert found.byte_perplexity == pytest.approx(math.exp(0.8))


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(MptTrtError, match=r"the text is empty; set quality\.text"):
        text_windows("", read_tokenizer(MODEL), 8)
