"""Greedy generation against transformers, tokens as they come, and requests that do not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from support.generation import (
    END,
    NETWORKS,
    PAD,
    PROMPTS,
    VOCAB,
    ChoosingModel,
    NetworkModel,
    UntouchableModel,
    assert_same,
    ends_within,
    greedy,
    new_tokens,
    random_network,
    token_lists,
    transformers_generate,
)


@pytest.mark.parametrize("num_heads", NETWORKS)
@pytest.mark.parametrize("end_ids", [(), (END,), (20,), (END, 20), (20, 7, END)])
def test_greedy_is_that_of_transformers(num_heads: int, end_ids: tuple[int, ...]) -> None:
    config = greedy(end_ids=end_ids)
    network = NETWORKS[num_heads]
    ours = generate(NetworkModel(network), PROMPTS, config)
    assert_same(ours, transformers_generate(network, PROMPTS, config))


@pytest.mark.parametrize("end_ids", [(), (END,), (20,), (END, 20), (20, 7, END)])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 14])
def test_a_model_that_chooses_itself_gives_the_same(end_ids, max_new_tokens) -> None:
    config = greedy(end_ids=end_ids, max_new_tokens=max_new_tokens)
    told: dict[str, list] = {"plain": [], "choosing": []}
    found = {}
    for name, kind in (("plain", NetworkModel), ("choosing", ChoosingModel)):
        found[name] = generate(
            kind(NETWORKS[2]),
            PROMPTS,
            config,
            on_token=lambda *token, name=name: told[name].append(token),
            on_step=lambda *step, name=name: told[name].append(step),
        )
    assert token_lists(found["choosing"]) == token_lists(found["plain"])
    for ours, expected in zip(found["choosing"], found["plain"], strict=True):
        assert ours[0].cumulative_log_prob == pytest.approx(expected[0].cumulative_log_prob)
    assert told["choosing"] == told["plain"]


def test_a_model_that_chooses_itself_is_stopped_one_step_behind_the_end() -> None:
    prompts = [prompt for prompt in PROMPTS if ends_within(prompt, 14)]
    model = ChoosingModel(NETWORKS[2], capacity=64)
    output = token_lists(generate(model, prompts, greedy(max_new_tokens=40)))
    assert len(model.steps) == max(map(len, output)) + 1


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.2}, {"top_k": 4}, {"num_beams": 2}])
def test_a_model_chooses_itself_only_what_is_likeliest(options) -> None:
    class Refusing(NetworkModel):
        def greedy_steps(self, tokens, write_positions, count):
            raise AssertionError("asked to choose")

    expected = generate(NetworkModel(NETWORKS[2]), PROMPTS, greedy(**options))
    assert token_lists(generate(Refusing(NETWORKS[2]), PROMPTS, greedy(**options))) == token_lists(
        expected
    )


def test_a_choice_among_numbers_that_are_none_is_refused() -> None:
    class Overflowing(ChoosingModel):
        def greedy_steps(self, tokens, write_positions, count):
            yield tokens, np.array([0.0, np.nan], np.float32)

    with pytest.raises(FloatingPointError, match="row 1 are not finite"):
        generate(Overflowing(NETWORKS[2]), PROMPTS[:2], greedy(end_ids=()))


@pytest.mark.parametrize("penalty", [0.7, 1.2, 1.5, 3.0])
def test_greedy_with_a_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    # One by one: in a padded batch transformers penalizes the pad token too.
    config = greedy(repetition_penalty=penalty)
    ours = generate(NetworkModel(NETWORKS[2]), PROMPTS, config)
    alone = [transformers_generate(NETWORKS[2], [prompt], config)[0] for prompt in PROMPTS]
    assert_same(ours, alone)
    assert token_lists(ours) != token_lists(generate(NetworkModel(NETWORKS[2]), PROMPTS, greedy()))


def test_the_end_token_ends_a_row_and_is_part_of_it() -> None:
    endless = token_lists(generate(NetworkModel(NETWORKS[2]), PROMPTS, greedy(end_ids=())))
    ended = token_lists(generate(NetworkModel(NETWORKS[2]), PROMPTS, greedy()))
    assert {len(tokens) for tokens in endless} == {14}
    assert ended == [new_tokens(list(tokens), (END,)) for tokens in endless]
    assert len({len(tokens) for tokens in ended}) > 2


def test_generation_stops_with_the_last_row_that_ends() -> None:
    model = NetworkModel(NETWORKS[2], capacity=64)
    prompts = [prompt for prompt in PROMPTS if ends_within(prompt, 14)]
    assert len(prompts) > 1
    output = token_lists(generate(model, prompts, greedy(max_new_tokens=40)))
    assert len(model.steps) == max(map(len, output)) < 40


def test_a_row_that_has_ended_is_fed_padding() -> None:
    model = NetworkModel(NETWORKS[2])
    output = token_lists(generate(model, PROMPTS, greedy(pad_id=33)))
    fed = np.concatenate([ids for ids, _, _ in model.steps[1:]], axis=1)
    for row, tokens in zip(fed.tolist(), output, strict=True):
        assert row == (list(tokens) + [33] * len(row))[: len(row)]


def test_a_pad_token_that_the_model_chooses_is_output() -> None:
    endless = greedy(end_ids=())
    plain = token_lists(generate(NetworkModel(NETWORKS[2]), PROMPTS, endless))
    for pad_id in (plain[0][1], END):
        padded = generate(NetworkModel(NETWORKS[2]), PROMPTS, replace(endless, pad_id=pad_id))
        assert token_lists(padded) == plain


def test_the_end_token_may_be_the_pad_token() -> None:
    plain = generate(NetworkModel(NETWORKS[2]), PROMPTS, greedy())
    assert generate(NetworkModel(NETWORKS[2]), PROMPTS, greedy(pad_id=END)) == plain


def test_no_prompts_no_output() -> None:
    assert generate(UntouchableModel(), [], greedy()) == []


def test_prompts_may_be_arrays() -> None:
    prompts = np.array(PROMPTS[0] + PROMPTS[4][:4]).reshape(2, 5)
    output = generate(NetworkModel(NETWORKS[2]), prompts, greedy())
    assert output == generate(NetworkModel(NETWORKS[2]), prompts.tolist(), greedy())
    assert all(type(token) is int for tokens in token_lists(output) for token in tokens)


@pytest.mark.parametrize("seed", range(40))
def test_any_request_gives_what_transformers_gives(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    network = random_network(seed, num_heads=int(numbers.choice([2, 4])))
    prompts = [
        numbers.integers(0, VOCAB, size=numbers.integers(1, 12)).tolist()
        for _ in range(numbers.integers(1, 4))
    ]
    # End tokens that the network really produces.
    trial = generate(NetworkModel(network), prompts, greedy(end_ids=()))
    config = GenerationConfig(
        max_new_tokens=int(numbers.integers(1, 20)),
        end_ids=tuple({int(token) for token in numbers.choice(trial[0][0].tokens, 2)}),
        pad_id=PAD,
        num_beams=int(numbers.integers(1, 6)),
        repetition_penalty=float(numbers.choice([1.0, 1.0, 0.9, 1.2])),
        length_penalty=float(numbers.choice([-1.0, 0.0, 0.3, 1.0, 1.0, 2.5])),
    )
    model = NetworkModel(network, max_step_tokens=int(numbers.integers(1, 12)))
    ours = generate(model, prompts, config)
    assert_same(ours, [transformers_generate(network, [one], config)[0] for one in prompts])


@pytest.mark.parametrize(
    "config",
    [
        greedy(),
        greedy(repetition_penalty=1.4, top_log_probs=2),
        greedy(top_k=5, temperature=0.7, top_p=0.8, top_log_probs=VOCAB + 1),
        greedy(num_beams=3, length_penalty=2.0),
        greedy(num_beams=3, repetition_penalty=1.4),
    ],
    ids=["greedy", "greedy penalty", "sampling", "beams", "beams penalty"],
)
def test_log_probs_are_the_models_own(config: GenerationConfig) -> None:
    for prompt, row in zip(
        PROMPTS, generate(NetworkModel(NETWORKS[2]), PROMPTS, config), strict=True
    ):
        for one in row:
            ids = torch.tensor([[*prompt, *one.tokens]])
            with torch.no_grad():
                log_probs = NETWORKS[2](ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            exact = log_probs[torch.arange(len(one.tokens)), list(one.tokens)]
            assert one.log_probs == pytest.approx(exact.tolist(), abs=1e-4)
            assert one.cumulative_log_prob == pytest.approx(exact.sum().item(), abs=1e-4)
            best = log_probs.topk(min(config.top_log_probs, VOCAB))
            ids = [tuple(token for token, _ in top) for top in one.top_log_probs]
            assert ids == [tuple(row) for row in best.indices.tolist() if row]
            for top, values in zip(one.top_log_probs, best.values.tolist(), strict=False):
                assert [value for _, value in top] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("top_k", [1, 0])
def test_tokens_are_streamed_as_they_are_chosen(top_k: int) -> None:
    streamed: list[tuple[int, int, int]] = []
    model = NetworkModel(NETWORKS[2])
    output = token_lists(
        generate(
            model,
            PROMPTS,
            greedy(top_k=top_k),
            on_token=lambda row, token: streamed.append((len(model.steps), row, token)),
        )
    )
    assert streamed == [
        (step + 1, row, tokens[step])
        for step in range(max(map(len, output)))
        for row, tokens in enumerate(output)
        if step < len(tokens)
    ]


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty; it must hold at least 1 token"),
        ([[1], [4, 61]], {}, "prompt 1 holds token 61 and the vocabulary is 0..60; encode it"),
        ([[-1]], {}, "prompt 0 holds token -1 and the vocabulary is 0..60; encode it"),
        (
            [[1]],
            {"end_ids": (3, 61)},
            "token 61 of end_ids does not exist, because the vocabulary is 0..60",
        ),
        (
            [[1]],
            {"pad_id": 99},
            "token 99 of pad_id does not exist, because the vocabulary is 0..60",
        ),
        (
            [[1], [1, 2, 3]],
            {},
            "prompt 1 has 3 tokens, which with max_new_tokens 14 makes 17, but a cache row holds"
            " 16; shorten the prompt, lower max_new_tokens or build for longer sequences",
        ),
        (
            [[1], [2], [3]],
            {"num_beams": 3},
            "3 prompt(s) with num_beams 3 need 9 cache rows, but the model has 8; send fewer "
            "prompts at a time, lower num_beams or build for a larger batch",
        ),
        (
            [[1]] * 9,
            {},
            "9 prompt(s) with num_beams 1 need 9 cache rows, but the model has 8; send",
        ),
        (
            [[1]],
            {"num_beams": 31},
            "num_beams is 31, too many for a vocabulary of 61 tokens; it must be at most 30",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_refused_before_any_step(
    prompts: list[list[int]], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        generate(UntouchableModel(), prompts, greedy(**changes))
    assert str(refusal.value).startswith(message)


def test_streaming_beams_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^streaming and stop strings need num_beams 1, and it is 2"
    ):
        generate(UntouchableModel(), [[1]], greedy(num_beams=2), on_token=lambda row, token: None)
