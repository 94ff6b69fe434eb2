"""Steps of every kind, as generation makes them, on two engines whose logits must agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from mpt_trt.engines.interface import GreedyModel, StepModel
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.generation.logits import log_softmax
from support.engines import Ids, deviation

ROWS = 3


def require_same_steps(
    ours: GreedyModel, theirs: StepModel, vocab_size: int, bound: float, seed: int = 0
) -> None:
    """Makes the steps of `make_steps`; fails where the difference exceeds the bound."""

    def require(difference: float, step: str) -> None:
        assert difference <= bound, step

    make_steps(ours, theirs, vocab_size, require, seed)


@dataclass
class _Steps:
    """Makes the same steps on two engines.

    judge: is called with the difference of each step's logits, as a multiple of their standard
    deviation, and with a description of the step.
    """

    ours: GreedyModel
    theirs: StepModel
    vocab_size: int
    judge: Callable[[float, str], None]
    numbers: np.random.Generator

    def start(self, rows: int) -> None:
        for model in (self.ours, self.theirs):
            model.start(rows)

    def reorder(self, rows: list[int]) -> None:
        for model in (self.ours, self.theirs):
            model.reorder(np.array(rows))

    def step(self, seq: int, positions: Sequence[int], logit_rows: Sequence[int]) -> None:
        ids = self.numbers.integers(0, self.vocab_size, (len(positions), seq))
        # Of the last token or, to vary it, of an earlier one.
        where = np.array([(row, (seq - 1) * (row % 2 == 0)) for row in logit_rows], np.int64)
        arguments: tuple[Ids, Ids, Ids] = (ids, np.array(positions), where.reshape(-1, 2))
        found, expected = (model.step(*arguments) for model in (self.ours, self.theirs))
        assert found.shape == expected.shape == (len(logit_rows), self.vocab_size)
        if logit_rows:
            step_name = f"{seq} tokens at {list(positions)}, logits of {list(logit_rows)}"
            self.judge(deviation(found, expected), step_name)

    def choose(self, positions: Sequence[int], count: int, most: int) -> None:
        """Takes `count` of at most `most` tokens that the first engine chooses."""
        tokens = self.numbers.integers(0, self.vocab_size, len(positions))
        start, rows = np.array(positions), np.arange(len(positions))
        where = np.stack([rows, np.zeros_like(rows)], axis=1)
        chosen_steps = self.ours.greedy_steps(tokens, start, most)
        with closing(chosen_steps) as steps:  # type: ignore[type-var]
            for index, (chosen, log_probs) in zip(range(count), steps, strict=False):
                logits = self.theirs.step(tokens[:, None], start + index, where)
                short = logits.max(axis=-1) - logits[rows, chosen]
                off = np.abs(log_softmax(logits)[rows, chosen] - log_probs)
                step_name = f"token {index} after {list(positions)}, which the engine chose"
                self.judge(float((short + off).max() / logits.std()), step_name)
                tokens = chosen


def make_steps(
    ours: GreedyModel,
    theirs: StepModel,
    vocab_size: int,
    judge: Callable[[float, str], None],
    seed: int = 0,
) -> None:
    """Prompts in pieces, ragged rows, single tokens, other numbers of rows and logits, new order.

    Single tokens are also those that the engine chooses itself. Both engines need 4 rows and 32
    positions, and take at least 9 tokens per step. judge: see `_Steps`.
    """
    on_both = _Steps(ours, theirs, vocab_size, judge, np.random.default_rng(seed))
    every = range(ROWS)
    on_both.start(ROWS)
    # A prompt in pieces, of which the first gives no logits; rows end at different places.
    on_both.step(5, [0, 0, 0], [])
    on_both.step(9, [5, 5, 5], every)
    # Plain, plain, captured, replayed; with fewer logits in between, and then replayed again.
    for index in range(4):
        on_both.step(1, [14 + index, 7 + index, 10 + index], every)
    on_both.step(1, [18, 11, 14], [1])
    on_both.step(1, [19, 12, 15], every)
    on_both.step(1, [20, 13, 16], [])
    # Beam search: more rows, then others, with a step in between that uses the same graph again.
    on_both.reorder([2, 2, 0, 1])
    for index in range(4):
        on_both.step(1, [17 + index, 17 + index, 21 + index, 14 + index], range(4))
    on_both.reorder([3, 1, 0, 0])
    on_both.step(1, [18, 21, 21, 21], range(4))
    on_both.reorder([1, 2])
    on_both.step(4, [22, 22], [1, 0])
    # Anew with as many rows as at first.
    on_both.start(ROWS)
    on_both.step(9, [0, 0, 0], every)
    for index in range(4):
        on_both.step(1, [9 + index] * ROWS, every)
    # The engine chooses; some rows continue at an earlier position. Then it is stopped early.
    on_both.choose([13, 11, 12], 6, 6)
    on_both.step(1, [19, 17, 18], every)
    on_both.choose([20, 18, 19], 3, 9)
    on_both.step(1, [23, 21, 22], every)


def require_same_text(ours: StepModel, theirs: StepModel, vocab_size: int) -> None:
    """Greedy decoding of prompts of different lengths, beam search, and greedy decoding again."""
    numbers = np.random.default_rng(1)
    prompts = [numbers.integers(0, vocab_size, size).tolist() for size in (9, 4, 19)]
    for beams, count in ((1, 3), (2, 2), (1, 3)):
        config = GenerationConfig(8, end_ids=(7,), pad_id=0, num_beams=beams)
        found, expected = (generate(model, prompts[:count], config) for model in (ours, theirs))
        for mine, other in zip(found, expected, strict=True):
            assert [each.tokens for each in mine] == [each.tokens for each in other]
