"""Sampling against the exact probabilities that follow from transformers' logits warpers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.generation.sampling import TokenChooser
from support.generation import NETWORKS, PROMPTS, NetworkModel, TableModel, greedy, token_lists

SAMPLING = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 1.7},
    "cold": {"top_k": 0, "temperature": 0.6},
    "top-k": {"top_k": 3},
    "top-p": {"top_k": 0, "top_p": 0.75},
    "top-k, then top-p": {"top_k": 3, "top_p": 0.8},
    "all": {"top_k": 5, "top_p": 0.8, "temperature": 1.5, "repetition_penalty": 1.6},
}


def exact_probabilities(
    logits: np.ndarray, seen: list[int], config: GenerationConfig
) -> np.ndarray:
    """`[vocab]` by the processors of transformers, in the order in which it applies them."""
    processors = LogitsProcessorList()
    if config.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.temperature != 1:
        processors.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k > 0:
        processors.append(TopKLogitsWarper(config.top_k))
    if 0 < config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    scores = processors(torch.tensor([seen]), torch.from_numpy(logits.astype(np.float64))[None])
    return scores.softmax(-1)[0].numpy()


def assert_drawn_from(tokens: list[int], probabilities: np.ndarray) -> None:
    """Pearson's chi-square test at 4 standard deviations (1 in 30,000).

    The critical value is the Wilson-Hilferty approximation.
    """
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * len(tokens)
    assert expected.min() > 5, "too few draws for the test to mean anything"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = possible.sum() - 1
    variance = 2 / (9 * freedom)
    assert statistic < freedom * (1 - variance + 4 * np.sqrt(variance)) ** 3


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_tokens_are_drawn_with_the_right_probabilities(options: dict[str, float]) -> None:
    table = np.random.default_rng(7).normal(0, 1.2, size=(7, 7))
    config = greedy(end_ids=(), max_new_tokens=2, random_seed=1, **options)
    output = token_lists(generate(TableModel(table), [[4, 2]] * 6000, config))
    first = exact_probabilities(table[2], [4, 2], config)
    assert_drawn_from([tokens[0] for tokens in output], first)
    likely = int(first.argmax())
    second = exact_probabilities(table[likely], [4, 2, likely], config)
    assert_drawn_from([tokens[1] for tokens in output if tokens[0] == likely], second)


def test_tokens_of_one_row_are_drawn_with_the_right_probabilities() -> None:
    model = TableModel(np.tile(np.array([0.3, 1.1, -0.5, 0.0]), (4, 1)))
    model.capacity = 5000
    config = greedy(end_ids=(), max_new_tokens=4000, top_k=0)
    tokens = generate(model, [[0]], config)[0][0].tokens
    assert_drawn_from(list(tokens), exact_probabilities(model.table[0], [0], config))


@pytest.mark.parametrize("vocab", [255, 256, 5000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_tokens_invert_the_cumulative_distribution(
    options: dict[str, float], spread: float, vocab: int
) -> None:
    """A row's token is the first at which it exceeds the row's random number."""
    numbers = np.random.default_rng(3)
    logits = numbers.normal(0, spread, (2, vocab)).astype(np.float32)
    seen = numbers.integers(0, vocab, (2, 9))
    config, streams = greedy(**options, random_seed=11), [0, 5]
    chooser = TokenChooser(config, streams)
    parts = [np.random.default_rng((11, stream)) for stream in streams]
    sums = [
        np.cumsum(exact_probabilities(row, ids.tolist(), config))
        for row, ids in zip(logits, seen, strict=True)
    ]
    for _ in range(50):
        tokens, _, _ = chooser.choose(logits, seen)
        for token, cumulative, part in zip(tokens, sums, parts, strict=True):
            point = part.random()
            nearest = np.abs(cumulative - point).min()
            # Ours are float32 without filters.
            assert nearest < 1e-5 or token == np.searchsorted(cumulative, point, side="right")


def test_the_seed_decides_the_sample() -> None:
    def sample(seed: int, prompts: list[list[int]]) -> list[tuple[int, ...]]:
        config = greedy(end_ids=(), top_k=0, random_seed=seed)
        return token_lists(generate(NetworkModel(NETWORKS[2]), prompts, config))

    same_prompt = [PROMPTS[0]] * 4
    assert sample(5, same_prompt) == sample(5, same_prompt)
    assert sample(5, same_prompt) != sample(6, same_prompt)
    assert len(set(sample(5, same_prompt))) == 4


def test_top_k_1_is_greedy_whatever_else_is_set() -> None:
    # Three tokens tie for the first place; sampling among the top 1 would take any of them.
    model = TableModel(np.tile(np.array([0.0, 2.0, 2.0, 1.0, 2.0]), (5, 1)))
    config = greedy(end_ids=(), top_k=1, temperature=9.0, top_p=0.5, random_seed=4)
    assert set(generate(model, [[0]] * 3, config)[2][0].tokens) == {1}


def test_a_tiny_temperature_is_as_good_as_greedy() -> None:
    config = greedy(top_k=0, temperature=1e-300)
    output = generate(NetworkModel(NETWORKS[2]), PROMPTS, config)
    assert output == generate(NetworkModel(NETWORKS[2]), PROMPTS, greedy())
