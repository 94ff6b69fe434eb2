"""Token generation against transformers.

Greedy and beam search are held against its `generate`, sampling against its logits warpers and the
exact probabilities that follow from them.

The engine of these tests is a random MPT of transformers itself, which keeps the token ids of each
cache row and computes all of it anew in every step. So the only thing under test is generation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from transformers import MptConfig, MptForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mpt_trt.generation.config import Generated, GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.generation.logits import keep_top_k, keep_top_p, log_softmax, penalize_repetition

VOCAB = 61
PAD = 0
END = 54  # the networks of `NETWORKS` end some of `PROMPTS` with it, soon or late
PROMPTS = [
    [44, 39, 33, 60, 2, 19],
    [7],
    [23, 9, 58, 20, 34, 3, 53, 5, 24, 11, 40],
    [3, 3, 41],
    [12, 55, 26, 1, 1, 30, 17],
    [46, 20],
]


def random_network(seed: int, num_heads: int) -> MptForCausalLM:
    """A network whose next token is neither certain nor a toss-up, thanks to large weights.

    The head is not tied: with a tied one the network mostly repeats its input.
    """
    config = MptConfig(
        d_model=32,
        n_heads=num_heads,
        n_layers=2,
        vocab_size=VOCAB,
        max_seq_len=64,
        tie_word_embeddings=False,
    )
    network = MptForCausalLM(config).eval()
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.5 if name == "lm_head.weight" else 0.35, generator=numbers)
    return network


NETWORKS = {num_heads: random_network(56, num_heads) for num_heads in (2, 4)}


class NetworkModel:
    """A StepModel over a network of transformers, which notes what it is asked to do.

    It fails on a step that breaks the contract, or that looks at a position never written.
    """

    def __init__(
        self,
        network: MptForCausalLM,
        capacity: int = 40,
        max_batch_size: int = 64,
        max_step_tokens: int = 40,
    ) -> None:
        self.network = network
        self.vocab_size = network.config.vocab_size
        self.capacity = capacity
        self.max_batch_size = max_batch_size
        self.max_step_tokens = max_step_tokens
        self.ids = np.zeros((0, capacity), dtype=np.int64)
        self.steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.reorders: list[list[int]] = []

    def start(self, batch_size: int) -> None:
        assert 1 <= batch_size <= self.max_batch_size
        self.ids = np.full((batch_size, self.capacity), -1, dtype=np.int64)

    def step(self, input_ids, write_positions, logit_positions):
        self.check_contract(input_ids, write_positions, logit_positions)
        self.steps.append((input_ids.copy(), write_positions.copy(), logit_positions.copy()))
        for row, (tokens, start) in enumerate(zip(input_ids, write_positions, strict=True)):
            self.ids[row, start : start + len(tokens)] = tokens
        if len(logit_positions) == 0:
            return np.zeros((0, self.vocab_size), dtype=np.float32)
        rows, index = logit_positions.T
        last = write_positions[rows] + index
        logits = self.logits(self.ids[rows, : last.max() + 1], last)
        logits.setflags(write=False)
        return logits

    def check_contract(self, input_ids, write_positions, logit_positions) -> None:
        for argument in (input_ids, write_positions, logit_positions):
            assert argument.dtype == np.int64
            assert argument.flags.c_contiguous
        rows, seq = input_ids.shape
        assert rows == len(self.ids)
        assert 1 <= seq <= self.max_step_tokens
        assert input_ids.min() >= 0 and input_ids.max() < self.vocab_size
        assert write_positions.shape == (rows,)
        assert write_positions.min() >= 0 and write_positions.max() + seq <= self.capacity
        assert logit_positions.ndim == 2 and logit_positions.shape[1] == 2
        assert ((logit_positions >= 0) & (logit_positions < [rows, seq])).all()

    def logits(self, ids: np.ndarray, last: np.ndarray) -> np.ndarray:
        visible = np.arange(ids.shape[1]) <= last[:, None]
        assert (ids[visible] >= 0).all(), "a query would see a cache position never written"
        known = torch.from_numpy(np.where(visible, ids, 0))
        with torch.no_grad():
            return (
                self.network(known).logits[torch.arange(len(last)), torch.from_numpy(last)].numpy()
            )

    def reorder(self, rows) -> None:
        assert rows.dtype == np.int64 and rows.ndim == 1
        assert len(rows) <= self.max_batch_size
        self.reorders.append(rows.tolist())
        self.ids = self.ids[rows]


class ChoosingModel(NetworkModel):
    """A GreedyModel over the same, which has always run the next step when it gives a result."""

    def greedy_steps(self, tokens, write_positions, count):
        rows = np.arange(len(tokens))
        where = np.stack([rows, np.zeros_like(rows)], axis=1)
        waiting = None
        for index in range(count):
            logits = self.step(tokens[:, None].copy(), write_positions + index, where)
            tokens = logits.argmax(axis=-1)
            gained = log_softmax(logits)[rows, tokens]
            if waiting is not None:
                yield waiting
            waiting = tokens, gained
        if waiting is not None:
            yield waiting


class TableModel:
    """A StepModel whose next token depends on the last one alone: `table[token]` are the logits."""

    def __init__(self, table: np.ndarray, max_batch_size: int = 10_000) -> None:
        self.table = np.asarray(table, dtype=np.float32)
        self.vocab_size = self.table.shape[1]
        self.capacity = 32
        self.max_batch_size = max_batch_size
        self.max_step_tokens = 32

    def start(self, batch_size: int) -> None:
        pass

    def step(self, input_ids, write_positions, logit_positions):
        rows, index = logit_positions.T
        return self.table[input_ids[rows, index]]

    def reorder(self, rows) -> None:
        pass


class UntouchableModel:
    """Has limits, and nothing else may be asked of it."""

    vocab_size = VOCAB
    capacity = 16
    max_batch_size = 8
    max_step_tokens = 8

    def start(self, batch_size: int) -> None:
        raise AssertionError("the model was touched")

    step = reorder = start


def greedy(**changes) -> GenerationConfig:
    return replace(GenerationConfig(max_new_tokens=14, end_id=END, pad_id=PAD), **changes)


def new_tokens(tokens: list[int], end_id: int | None) -> tuple[int, ...]:
    """The tokens without what transformers fills up with behind the end token."""
    if end_id not in tokens:
        return tuple(tokens)
    return tuple(tokens[: tokens.index(end_id) + 1])


def transformers_generate(
    network: MptForCausalLM, prompts: list[list[int]], config: GenerationConfig
) -> list[list[tuple[tuple[int, ...], float | None]]]:
    """(tokens, score) of every hypothesis of every prompt, from one left padded batch.

    The score is None without beams.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    beams = config.num_beams
    beam_options = {"length_penalty": config.length_penalty} if beams > 1 else {}
    output = network.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        use_cache=True,
        max_new_tokens=config.max_new_tokens,
        num_beams=beams,
        num_return_sequences=beams,
        repetition_penalty=config.repetition_penalty,
        eos_token_id=config.end_id,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **beam_options,
    )
    tokens = [new_tokens(row, config.end_id) for row in output.sequences[:, longest:].tolist()]
    scores = output.sequences_scores.tolist() if beams > 1 else [None] * len(tokens)
    flat = list(zip(tokens, scores, strict=True))
    return [flat[start : start + beams] for start in range(0, len(flat), beams)]


def assert_same(
    ours: list[list[Generated]], reference: list[list[tuple[tuple[int, ...], float | None]]]
) -> None:
    assert [[one.tokens for one in row] for row in ours] == [
        [tokens for tokens, _ in row] for row in reference
    ]
    for row, reference_row in zip(ours, reference, strict=True):
        for one, (_, score) in zip(row, reference_row, strict=True):
            expected = None if score is None else pytest.approx(score, rel=2e-6, abs=2e-5)
            assert one.score == expected


def token_lists(output: list[list[Generated]]) -> list[tuple[int, ...]]:
    return [row[0].tokens for row in output]


# Greedy


@pytest.mark.parametrize("num_heads", NETWORKS)
@pytest.mark.parametrize("end_id", [None, END, 20])
def test_greedy_is_that_of_transformers(num_heads: int, end_id: int | None) -> None:
    config = greedy(end_id=end_id)
    network = NETWORKS[num_heads]
    ours = generate(NetworkModel(network), PROMPTS, config)
    assert_same(ours, transformers_generate(network, PROMPTS, config))


@pytest.mark.parametrize("end_id", [None, END, 20])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 14])
def test_a_model_that_chooses_itself_gives_the_same(end_id, max_new_tokens) -> None:
    config = greedy(end_id=end_id, max_new_tokens=max_new_tokens)
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
        generate(Overflowing(NETWORKS[2]), PROMPTS[:2], greedy(end_id=None))


@pytest.mark.parametrize("penalty", [0.7, 1.2, 1.5, 3.0])
def test_greedy_with_a_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    # One by one: in a padded batch transformers penalizes the pad token too.
    config = greedy(repetition_penalty=penalty)
    ours = generate(NetworkModel(NETWORKS[2]), PROMPTS, config)
    alone = [transformers_generate(NETWORKS[2], [prompt], config)[0] for prompt in PROMPTS]
    assert_same(ours, alone)
    assert token_lists(ours) != token_lists(generate(NetworkModel(NETWORKS[2]), PROMPTS, greedy()))


def test_the_end_token_ends_a_row_and_is_part_of_it() -> None:
    endless = token_lists(generate(NetworkModel(NETWORKS[2]), PROMPTS, greedy(end_id=None)))
    ended = token_lists(generate(NetworkModel(NETWORKS[2]), PROMPTS, greedy()))
    assert {len(tokens) for tokens in endless} == {14}
    assert ended == [new_tokens(list(tokens), END) for tokens in endless]
    assert len({len(tokens) for tokens in ended}) > 2


def test_generation_stops_with_the_last_row_that_ends() -> None:
    model = NetworkModel(NETWORKS[2], capacity=64)
    prompts = [prompt for prompt in PROMPTS if ends_within(prompt, 14)]
    assert len(prompts) > 1
    output = token_lists(generate(model, prompts, greedy(max_new_tokens=40)))
    assert len(model.steps) == max(map(len, output)) < 40


def ends_within(prompt: list[int], max_new_tokens: int) -> bool:
    config = greedy(max_new_tokens=max_new_tokens)
    return generate(NetworkModel(NETWORKS[2]), [prompt], config)[0][0].tokens[-1] == END


def test_a_row_that_has_ended_is_fed_padding() -> None:
    model = NetworkModel(NETWORKS[2])
    output = token_lists(generate(model, PROMPTS, greedy(pad_id=33)))
    fed = np.concatenate([ids for ids, _, _ in model.steps[1:]], axis=1)
    for row, tokens in zip(fed.tolist(), output, strict=True):
        assert row == (list(tokens) + [33] * len(row))[: len(row)]


def test_a_pad_token_that_the_model_chooses_is_output() -> None:
    endless = greedy(end_id=None)
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


# Beam search


@pytest.mark.parametrize("num_beams", [2, 3, 4, 5])
@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("end_id", [None, END])
def test_beams_are_those_of_transformers(
    num_beams: int, length_penalty: float, end_id: int | None
) -> None:
    config = greedy(num_beams=num_beams, length_penalty=length_penalty, end_id=end_id)
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


@pytest.mark.parametrize("seed", range(40))
def test_any_request_gives_what_transformers_gives(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    network = random_network(seed, num_heads=int(numbers.choice([2, 4])))
    prompts = [
        numbers.integers(0, VOCAB, size=numbers.integers(1, 12)).tolist()
        for _ in range(numbers.integers(1, 4))
    ]
    # An end token that the network really produces.
    trial = generate(NetworkModel(network), prompts, greedy(end_id=None))
    config = GenerationConfig(
        max_new_tokens=int(numbers.integers(1, 20)),
        end_id=int(numbers.choice(trial[0][0].tokens)),
        pad_id=PAD,
        num_beams=int(numbers.integers(1, 6)),
        repetition_penalty=float(numbers.choice([1.0, 1.0, 0.9, 1.2])),
        length_penalty=float(numbers.choice([-1.0, 0.0, 0.3, 1.0, 1.0, 2.5])),
    )
    model = NetworkModel(network, max_step_tokens=int(numbers.integers(1, 12)))
    ours = generate(model, prompts, config)
    assert_same(ours, [transformers_generate(network, [one], config)[0] for one in prompts])


def test_beam_search_finds_better_than_greedy() -> None:
    endless = greedy(end_id=None)
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
    output = generate(model, [[1]], GenerationConfig(6, None, PAD, num_beams=2))
    assert output[0][0].tokens == (1,) * 6
    assert seen[0] == [0, 0]
    assert [0, 1] not in seen


# Prefill and batches


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
    generate(model, PROMPTS, greedy(end_id=None, max_new_tokens=4))
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    for step, (ids, starts, _) in enumerate(model.steps[1:]):
        assert ids.shape == (len(PROMPTS), 1)
        assert starts.tolist() == (lengths + step).tolist()


def test_a_row_may_fill_its_cache_to_the_last_position() -> None:
    model = NetworkModel(NETWORKS[2], capacity=11 + 14, max_batch_size=len(PROMPTS) * 2)
    roomy = NetworkModel(NETWORKS[2])
    for config in (greedy(), greedy(end_id=None), greedy(num_beams=2)):
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


# Log-probabilities


@pytest.mark.parametrize(
    "config",
    [
        greedy(),
        greedy(repetition_penalty=1.4),
        greedy(top_k=5, temperature=0.7, top_p=0.8),
        greedy(num_beams=3, length_penalty=2.0),
        greedy(num_beams=3, repetition_penalty=1.4),
    ],
    ids=["greedy", "greedy penalty", "sampling", "beams", "beams penalty"],
)
def test_log_prob_is_the_models_own(config: GenerationConfig) -> None:
    for prompt, row in zip(
        PROMPTS, generate(NetworkModel(NETWORKS[2]), PROMPTS, config), strict=True
    ):
        for one in row:
            ids = torch.tensor([[*prompt, *one.tokens]])
            with torch.no_grad():
                log_probs = NETWORKS[2](ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            exact = log_probs[torch.arange(len(one.tokens)), list(one.tokens)].sum().item()
            assert one.cumulative_log_prob == pytest.approx(exact, abs=1e-4)


# Sampling


def score_rows(min_side: int = 1) -> st.SearchStrategy[np.ndarray]:
    """Scores in which ties are common."""
    return arrays(
        np.float64,
        array_shapes(min_dims=2, max_dims=2, min_side=min_side, max_side=12),
        elements=st.one_of(st.integers(-3, 3).map(float), st.floats(-20, 20)),
    )


def warped(processor: object, scores: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    """What a logits processor of transformers makes of the scores."""
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
    config = greedy(end_id=None, max_new_tokens=2, random_seed=1, **options)
    output = token_lists(generate(TableModel(table), [[4, 2]] * 6000, config))
    first = exact_probabilities(table[2], [4, 2], config)
    assert_drawn_from([tokens[0] for tokens in output], first)
    likely = int(first.argmax())
    second = exact_probabilities(table[likely], [4, 2, likely], config)
    assert_drawn_from([tokens[1] for tokens in output if tokens[0] == likely], second)


def test_tokens_of_one_row_are_drawn_with_the_right_probabilities() -> None:
    model = TableModel(np.tile(np.array([0.3, 1.1, -0.5, 0.0]), (4, 1)))
    model.capacity = 5000
    config = greedy(end_id=None, max_new_tokens=4000, top_k=0)
    tokens = generate(model, [[0]], config)[0][0].tokens
    assert_drawn_from(list(tokens), exact_probabilities(model.table[0], [0], config))


def test_the_seed_decides_the_sample() -> None:
    def sample(seed: int, prompts: list[list[int]]) -> list[tuple[int, ...]]:
        config = greedy(end_id=None, top_k=0, random_seed=seed)
        return token_lists(generate(NetworkModel(NETWORKS[2]), prompts, config))

    same_prompt = [PROMPTS[0]] * 4
    assert sample(5, same_prompt) == sample(5, same_prompt)
    assert sample(5, same_prompt) != sample(6, same_prompt)
    assert len(set(sample(5, same_prompt))) == 4


def test_top_k_1_is_greedy_whatever_else_is_set() -> None:
    # Three tokens tie for the first place; sampling among the top 1 would take any of them.
    model = TableModel(np.tile(np.array([0.0, 2.0, 2.0, 1.0, 2.0]), (5, 1)))
    config = greedy(end_id=None, top_k=1, temperature=9.0, top_p=0.5, random_seed=4)
    assert set(generate(model, [[0]] * 3, config)[2][0].tokens) == {1}


def test_a_tiny_temperature_is_as_good_as_greedy() -> None:
    config = greedy(top_k=0, temperature=1e-300)
    output = generate(NetworkModel(NETWORKS[2]), PROMPTS, config)
    assert output == generate(NetworkModel(NETWORKS[2]), PROMPTS, greedy())


# Callbacks


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
    config = greedy(end_id=None, num_beams=3, max_new_tokens=4)
    generate(model, PROMPTS, config, on_step=lambda *report: reports.append(report))
    assert reports == [("prefill", sum(map(len, PROMPTS)))] + [("decode", 18)] * 3


# Errors


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_new_tokens", 0, "max_new_tokens is 0; it must be an integer of at least 1"),
        ("max_new_tokens", 2.5, "max_new_tokens is 2.5; it must be an integer of at least 1"),
        ("end_id", -1, "end_id is -1; it must be None or a token id >= 0"),
        ("pad_id", -2, "pad_id is -2; it must be a token id >= 0"),
        ("pad_id", None, "pad_id is None; it must be a token id >= 0"),
        ("num_beams", 0, "num_beams is 0; it must be an integer of at least 1"),
        ("temperature", 0.0, "temperature is 0.0; it must be a finite number above 0"),
        ("temperature", float("nan"), "temperature is nan; it must be a finite number above 0"),
        ("temperature", float("inf"), "temperature is inf; it must be a finite number above 0"),
        ("top_k", -1, "top_k is -1; it must be an integer of at least 0"),
        ("top_p", 1.5, "top_p is 1.5; it must be a number from 0 to 1"),
        ("top_p", -0.1, "top_p is -0.1; it must be a number from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty is 0; it must be a finite number above 0"),
        ("length_penalty", float("inf"), "length_penalty is inf; it must be a finite number"),
        ("random_seed", -7, "random_seed is -7; it must be an integer of at least 0"),
    ],
)
def test_a_config_field_out_of_range_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        greedy(**{field: value})


def test_beams_that_sample_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k is 50 with num_beams 4; it must be 1, because"):
        greedy(num_beams=4, top_k=50)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty; it must hold at least 1 token"),
        ([[1], [4, 61]], {}, "prompt 1 holds token 61 and the vocabulary is 0..60; encode it"),
        ([[-1]], {}, "prompt 0 holds token -1 and the vocabulary is 0..60; encode it"),
        ([[1]], {"end_id": 61}, "end_id is 61 and the vocabulary is 0..60; take it from"),
        ([[1]], {"pad_id": 99}, "pad_id is 99 and the vocabulary is 0..60; take it from"),
        (
            [[1], [1, 2, 3]],
            {},
            "prompt 1 has 3 tokens, which with max_new_tokens 14 makes 17, but a cache row holds"
            " 16; shorten the prompt, lower max_new_tokens or build for longer sequences",
        ),
        (
            [[1], [2], [3]],
            {"num_beams": 3},
            "3 prompts with num_beams 3 need 9 cache rows, but the model has 8; send fewer prompts"
            " at a time, lower num_beams or build for a larger batch",
        ),
        ([[1]] * 9, {}, "9 prompts with num_beams 1 need 9 cache rows, but the model has 8; send"),
        (
            [[1]],
            {"num_beams": 31},
            "num_beams is 31, more than half the vocabulary of 61 tokens; it must be at most 30",
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
    with pytest.raises(ValueError, match=r"^streaming needs num_beams 1, and it is 2"):
        generate(UntouchableModel(), [[1]], greedy(num_beams=2), on_token=lambda row, token: None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_logits_that_are_no_numbers_are_refused(bad: float, num_beams: int) -> None:
    table = np.zeros((5, 5))
    table[3, 1] = bad
    with pytest.raises(FloatingPointError, match=r"^the logits of row 1 are not finite"):
        generate(TableModel(table), [[2], [3]], greedy(end_id=None, num_beams=num_beams))


def test_logits_that_overflow_in_decode_are_refused() -> None:
    table = np.eye(5)[[1, 2, 3, 3, 4]] * 9
    table[3] = np.nan
    with pytest.raises(FloatingPointError, match=r"^the logits of row 0 are not finite"):
        generate(TableModel(table), [[0]], greedy(end_id=None))
