"""What every runtime offers of a loaded engine.

Shapes: `rows` counts rows of the KV cache, `vocab` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class StepModel(Protocol):
    """A loaded engine that runs one step at a time. It holds its KV cache."""

    vocab_size: int
    capacity: int
    """Cache positions per row: the most tokens, prompt and new ones together, a row can hold."""
    max_batch_size: int
    """Most cache rows."""
    max_step_tokens: int
    """Most tokens per row in one step; a longer prompt is prefilled in chunks."""

    def start(self, batch_size: int) -> None:
        """Makes the cache `batch_size` empty rows."""
        ...

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_positions: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Runs the network on `seq` further tokens of every row.

        Args:
            input_ids: `[rows, seq]`, 1 <= seq <= `max_step_tokens`.
            write_positions: `[rows]`. Keys and values of token j of row i go to cache position
                `write_positions[i] + j`; the query at position p sees positions <= p of its row.
            logit_positions: `[num_logits, 2]`, pairs (row, index within this step's seq).
                `num_logits` is 0 in a prefill chunk in which no prompt ends.

        Returns:
            `[num_logits, vocab]` float32 logits; only read, and not after the next step.
        """
        ...

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Makes cache row i a copy of the old row `rows[i]`, and `len(rows)` the number of rows.

        The number grows once, when beam search spreads the prompts out to beams.
        """
        ...


@runtime_checkable
class GreedyModel(StepModel, Protocol):
    """A model that also finds the likeliest tokens itself, without waiting for its caller."""

    def greedy_steps(
        self, tokens: NDArray[np.int64], write_positions: NDArray[np.int64], count: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Up to `count` steps of one token a row, as many as the caller takes.

        Args:
            tokens: `[rows]`, those of the first step; each further one takes what the one before
                it has chosen.
            write_positions: `[rows]`, of the first step; see `step`.

        Yields:
            Of each step, the likeliest token of every row and the natural log of its probability,
            both `[rows]`. A step more than was taken may have been run.
        """
        ...
