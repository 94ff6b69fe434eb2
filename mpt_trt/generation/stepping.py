"""Runs a model's steps for a batch of prompts (prefill) and the tokens after them (decode)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.interface import GreedyModel, StepModel
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.logits import require_finite, require_finite_rows

OnStep = Callable[[str, int], None]
"""Called with (phase, tokens) after each step of the model.

`phase` is "prefill" or "decode". `tokens` is the number of tokens that the step advanced: in
prefill, the prompt tokens that it read (without padding); in decode, the rows that are still being
generated. So the prefill counts add up to the prompt lengths. Without beams, the decode counts add
up to the new tokens minus one per prompt, which prefill gave.
"""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts in one array, padded on the right."""

    ids: NDArray[np.int64]  # [batch, longest]
    lengths: NDArray[np.int64]  # [batch]

    @classmethod
    def padded(cls, prompts: list[NDArray[np.int64]], pad_id: int) -> PromptBatch:
        """Pads prompts of any lengths with `pad_id`."""
        lengths = np.array([prompt.size for prompt in prompts], dtype=np.int64)
        ids = np.full((len(prompts), lengths.max()), pad_id, dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: prompt.size] = prompt
        return cls(ids, lengths)

    def vocabulary(self) -> NDArray[np.int64]:
        """Ids that occur in each prompt, `[batch, longest]`."""
        # The padding repeats the prompt's first token, because the pad id does not occur in it.
        is_prompt = np.arange(self.ids.shape[1]) < self.lengths[:, None]
        return np.where(is_prompt, self.ids, self.ids[:, :1])


@dataclass(frozen=True)
class Stepper:
    """Steps a model through prefill and decode."""

    model: StepModel
    prompts: PromptBatch
    on_step: OnStep

    def prefill(self) -> NDArray[np.float32]:
        """Reads all prompts; returns the logits at the last token of each, `[batch, vocab]`.

        All rows read their prompts at the same offset. Shorter rows get padding after their end,
        which no query sees: decode starts to write at the row's own end, and queries only look
        back.

        Raises:
            FloatingPointError: logits are not finite.
        """
        ids, last = self.prompts.ids, self.prompts.lengths - 1
        batch, longest = ids.shape
        self.model.start(batch)
        logits = np.empty((batch, self.model.vocab_size), dtype=np.float32)
        for offset in range(0, longest, self.model.max_step_tokens):
            chunk = np.ascontiguousarray(ids[:, offset : offset + self.model.max_step_tokens])
            index = last - offset
            ending = np.flatnonzero((index >= 0) & (index < chunk.shape[1]))
            wanted = np.stack([ending, index[ending]], axis=1)
            written = np.full(batch, offset, dtype=np.int64)
            logits[ending] = self.model.step(chunk, written, wanted)
            self.on_step("prefill", int(np.clip(index + 1, 0, chunk.shape[1]).sum()))
        return require_finite(logits)

    def decode(
        self, tokens: NDArray[np.int64], num_generated: int, num_live: int
    ) -> NDArray[np.float32]:
        """Reads the newest token of each row, `[rows]`; returns its logits, `[rows, vocab]`.

        Finished rows continue with the others; their positions stay in the cache, because every row
        has room for `max_new_tokens`.

        Args:
            tokens: `[rows]`, the `num_generated`-th token after the prompt of every row.
            num_generated: tokens per row so far.
            num_live: unfinished rows, for `on_step`.

        Raises:
            FloatingPointError: logits are not finite.
        """
        row = np.arange(tokens.size, dtype=np.int64)
        beams = tokens.size // self.prompts.lengths.size
        positions = np.repeat(self.prompts.lengths, beams) + num_generated - 1
        wanted = np.stack([row, np.zeros_like(row)], axis=1)
        logits = self.model.step(np.ascontiguousarray(tokens[:, None]), positions, wanted)
        self.on_step("decode", num_live)
        return require_finite(logits)

    def greedy_steps(
        self, model: GreedyModel, tokens: NDArray[np.int64], count: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Lets the model choose up to `count` tokens per row after the first; see `GreedyModel`.

        Raises:
            FloatingPointError: a log-probability is not finite.
        """
        for chosen, log_probs in model.greedy_steps(tokens, self.prompts.lengths, count):
            require_finite_rows(log_probs)
            yield chosen, log_probs

    def reorder(self, rows: NDArray[np.int64], num_rows: int) -> None:
        """Moves cache rows, unless all `num_rows` rows would stay in place."""
        if not np.array_equal(rows, np.arange(num_rows)):
            self.model.reorder(rows)


def is_end(tokens: NDArray[np.int64], config: GenerationConfig) -> NDArray[np.bool_]:
    """Returns whether each of `tokens` is an end token, with the same shape."""
    return np.isin(tokens, config.end_ids)
