"""Prefill in chunks, batches of prompts, and the steps that are reported."""

from __future__ import annotations

import numpy as np
import pytest

from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from support.generation import NETWORKS, PROMPTS, NetworkModel, greedy, token_lists


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("max_step_tokens", [1, 3, 11, 40])
def test_chunked_prefill_changes_nothing(num_beams: int, max_step_tokens: int) -> None:
    config = greedy(num_beams=num_beams)
    model = NetworkModel(NETWORKS[4], max_step_tokens=max_step_tokens)
    whole = generate(NetworkModel(NETWORKS[4]), PROMPTS, config)
    assert token_lists(generate(model, PROMPTS, config)) == token_lists(whole)


@pytest.mark.parametrize(
    ("max_step_tokens", "chunks"),
    [(1, [1] * 11), (3, [3, 3, 3, 2]), (10, [10, 1]), (11, [11]), (40, [11])],
)
def test_chunks_end_with_the_longest_prompt(max_step_tokens: int, chunks: list[int]) -> None:
    model = NetworkModel(NETWORKS[2], max_step_tokens=max_step_tokens)
    generate(model, PROMPTS, greedy(max_new_tokens=1))
    assert [ids.shape[1] for ids, _, _ in model.steps] == chunks
    offsets = [0, *np.cumsum(chunks)[:-1].tolist()]
    assert [set(starts.tolist()) for _, starts, _ in model.steps] == [{at} for at in offsets]
    asked = [
        (row, start + index)
        for start, (_, _, wanted) in zip(offsets, model.steps, strict=True)
        for row, index in wanted.tolist()
    ]
    assert sorted(asked) == [(row, len(prompt) - 1) for row, prompt in enumerate(PROMPTS)]


def test_padding_of_the_prompts_is_the_pad_token() -> None:
    model = NetworkModel(NETWORKS[2])
    generate(model, PROMPTS, greedy(pad_id=33, max_new_tokens=1))
    longest = max(map(len, PROMPTS))
    assert model.steps[0][0].tolist() == [
        prompt + [33] * (longest - len(prompt)) for prompt in PROMPTS
    ]


def test_decode_writes_behind_each_rows_own_prompt() -> None:
    model = NetworkModel(NETWORKS[2])
    generate(model, PROMPTS, greedy(end_ids=(), max_new_tokens=4))
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    for step, (ids, starts, _) in enumerate(model.steps[1:]):
        assert ids.shape == (len(PROMPTS), 1)
        assert starts.tolist() == (lengths + step).tolist()


def test_a_row_may_fill_its_cache_to_the_last_position() -> None:
    model = NetworkModel(NETWORKS[2], capacity=11 + 14, max_batch_size=len(PROMPTS) * 2)
    roomy = NetworkModel(NETWORKS[2])
    for config in (greedy(), greedy(end_ids=()), greedy(num_beams=2)):
        assert generate(model, PROMPTS, config) == generate(roomy, PROMPTS, config)


@pytest.mark.parametrize(
    "config",
    [greedy(), greedy(num_beams=3), greedy(top_k=0, random_seed=3), greedy(repetition_penalty=1.3)],
    ids=["greedy", "beams", "sampling", "penalty"],
)
def test_a_row_does_not_depend_on_the_others(config: GenerationConfig) -> None:
    whole = token_lists(generate(NetworkModel(NETWORKS[4]), PROMPTS, config))
    for row, tokens in enumerate(whole):
        others = [[row + 5, 9]] * row + [PROMPTS[row]] + [[2] * 13]
        assert token_lists(generate(NetworkModel(NETWORKS[4]), others, config))[row] == tokens


def test_steps_are_reported_with_what_they_were_good_for() -> None:
    reports: list[tuple[str, int]] = []
    model = NetworkModel(NETWORKS[2], max_step_tokens=4)
    output = token_lists(
        generate(
            model, PROMPTS, greedy(), on_step=lambda phase, tokens: reports.append((phase, tokens))
        )
    )
    assert reports[:3] == [("prefill", 4 + 1 + 4 + 3 + 4 + 2), ("prefill", 9), ("prefill", 3)]
    assert reports[3:] == [
        ("decode", sum(len(tokens) > step for tokens in output))
        for step in range(1, max(map(len, output)))
    ]
    assert len(reports) == len(model.steps)


def test_steps_of_beam_search_are_reported() -> None:
    reports: list[tuple[str, int]] = []
    model = NetworkModel(NETWORKS[2])
    config = greedy(end_ids=(), num_beams=3, max_new_tokens=4)
    generate(model, PROMPTS, config, on_step=lambda *report: reports.append(report))
    assert reports == [("prefill", sum(map(len, PROMPTS)))] + [("decode", 18)] * 3
