"""Beam search against transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from support.generation import (
    END,
    NETWORKS,
    PAD,
    PROMPTS,
    NetworkModel,
    TableModel,
    assert_same,
    greedy,
    transformers_generate,
)


@pytest.mark.parametrize("num_beams", [2, 3, 4, 5])
@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("end_ids", [(), (END,), (20, END), (END, 20, 7)])
def test_beams_are_those_of_transformers(
    num_beams: int, length_penalty: float, end_ids: tuple[int, ...]
) -> None:
    config = greedy(num_beams=num_beams, length_penalty=length_penalty, end_ids=end_ids)
    network = NETWORKS[4]
    ours = generate(NetworkModel(network), PROMPTS, config)
    assert_same(ours, transformers_generate(network, PROMPTS, config))


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("penalty", [0.8, 1.3])
def test_beams_with_a_repetition_penalty_are_those_of_transformers(
    num_beams: int, penalty: float
) -> None:
    config = greedy(num_beams=num_beams, repetition_penalty=penalty)
    ours = generate(NetworkModel(NETWORKS[2]), PROMPTS, config)
    alone = [transformers_generate(NETWORKS[2], [prompt], config)[0] for prompt in PROMPTS]
    assert_same(ours, alone)


def test_beam_search_finds_better_than_greedy() -> None:
    endless = greedy(end_ids=())
    single = generate(NetworkModel(NETWORKS[2]), PROMPTS, endless)
    beams = generate(NetworkModel(NETWORKS[2]), PROMPTS, replace(endless, num_beams=4))
    gains = [
        best[0].cumulative_log_prob - one[0].cumulative_log_prob
        for best, one in zip(beams, single, strict=True)
    ]
    assert sum(gain > 0.1 for gain in gains) >= 3


def test_hypotheses_come_best_first_and_differ() -> None:
    for row in generate(NetworkModel(NETWORKS[4]), PROMPTS, greedy(num_beams=5)):
        assert len({one.tokens for one in row}) == 5
        scores = [one.score for one in row]
        assert scores == sorted(scores, reverse=True)


def test_beam_search_stops_when_no_beam_can_improve() -> None:
    model = NetworkModel(NETWORKS[2], capacity=64)
    output = generate(model, PROMPTS[:1], greedy(num_beams=2, max_new_tokens=50))
    assert len(model.steps) < 50
    assert all(one.tokens[-1] == END for one in output[0])


def test_the_prompt_is_read_once_for_all_its_beams() -> None:
    model = NetworkModel(NETWORKS[2])
    generate(model, PROMPTS[:2], greedy(num_beams=3))
    assert model.steps[0][0].shape == (2, len(PROMPTS[0]))
    assert {len(ids) for ids, _, _ in model.steps[1:]} == {6}
    assert model.reorders[0] == [0, 0, 0, 1, 1, 1]


def test_the_cache_is_left_alone_while_beams_keep_their_rows() -> None:
    # Two tokens, each followed by itself: both beams go on as they are.
    model = TableModel(np.where(np.eye(4, dtype=bool), 9.0, [0.0, 5.0, 0.0, 5.0]))
    seen: list[list[int]] = []
    model.reorder = lambda rows: seen.append(rows.tolist())
    output = generate(model, [[1]], GenerationConfig(6, (), PAD, num_beams=2))
    assert output[0][0].tokens == (1,) * 6
    assert seen[0] == [0, 0]
    assert [0, 1] not in seen
