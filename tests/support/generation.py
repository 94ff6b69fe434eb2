"""Step models over transformers' own networks, and what transformers generates with them.

A random MPT of transformers keeps the token ids of each cache row and computes all of it anew in
every step. So generation is the only thing under test.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import MptConfig, MptForCausalLM

from mpt_trt.generation.config import Generated, GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.generation.logits import log_softmax

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
    """A StepModel whose next token depends only on the last one: `table[token]` are the logits."""

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
    """A model that has limits and fails on any other use."""

    vocab_size = VOCAB
    capacity = 16
    max_batch_size = 8
    max_step_tokens = 8

    def start(self, batch_size: int) -> None:
        raise AssertionError("the model was touched")

    step = reorder = start


def greedy(**changes) -> GenerationConfig:
    return replace(GenerationConfig(max_new_tokens=14, end_ids=(END,), pad_id=PAD), **changes)


def new_tokens(tokens: list[int], end_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens without the padding that transformers adds after an end token."""
    ends = (index + 1 for index, token in enumerate(tokens) if token in end_ids)
    return tuple(tokens[: next(ends, len(tokens))])


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
        eos_token_id=list(config.end_ids) or None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **beam_options,
    )
    tokens = [new_tokens(row, config.end_ids) for row in output.sequences[:, longest:].tolist()]
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


def ends_within(prompt: list[int], max_new_tokens: int) -> bool:
    config = greedy(max_new_tokens=max_new_tokens)
    return generate(NetworkModel(NETWORKS[2]), [prompt], config)[0][0].tokens[-1] == END
