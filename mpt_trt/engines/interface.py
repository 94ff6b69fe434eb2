"""The interface of all runtimes: a network that steps over its own KV cache.

In shapes, `rows` is the number of cache rows and `vocab` the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mpt_trt.system.mpi import Communicator


class StepModel(Protocol):
    """A loaded engine with its KV cache, as generation and evaluation use it."""

    vocab_size: int
    capacity: int
    """Cache positions per row: maximum number of prompt and new tokens together."""
    max_batch_size: int
    """Maximum number of cache rows."""
    max_step_tokens: int
    """Maximum number of tokens per row in one step; longer prompts are prefilled in chunks."""

    def start(self, batch_size: int) -> None:
        """Empties the cache and gives it `batch_size` rows."""
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
            float32 logits `[num_logits, vocab]`. The caller must not write to them, nor read them
            after the next step.
        """
        ...

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Makes cache row i a copy of the old row `rows[i]`, and `len(rows)` the number of rows.

        The number grows once, when beam search spreads the prompts out to beams.
        """
        ...


class RowModel(StepModel, Protocol):
    """A model whose steps can be limited to some rows of the cache; all runtimes are such models.

    So a new prompt can be read into one row while the rows of other prompts wait.
    """

    def select_rows(self, first: int, count: int) -> None:
        """Limits the following steps to `count` cache rows from row `first` on.

        Rows of a step, in `step` and `greedy_steps`, count from `first`. `start` and `reorder`
        select all rows. Raises MptTrtError when the runtime cannot start at that row.
        """
        ...

    def copy_row(self, source: int, target: int) -> None:
        """Makes cache row `target` a copy of row `source`, whichever rows are selected."""
        ...


@runtime_checkable
class GreedyModel(StepModel, Protocol):
    """A model that can also choose the most likely tokens itself."""

    def greedy_steps(
        self, tokens: NDArray[np.int64], write_positions: NDArray[np.int64], count: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Runs up to `count` steps of one token per row, until the caller stops.

        Args:
            tokens: `[rows]`, the input of the first step. Each later step reads the tokens that the
                step before it has chosen.
            write_positions: `[rows]`, positions of the first step; see `step`.
            count: maximum number of steps.

        Yields:
            For each step, the most likely token of every row and the natural log of its
            probability, both `[rows]`. The model may have run one step more than was taken.
        """
        ...


@runtime_checkable
class OverlappingModel(Protocol):
    """A model whose steps leave the host free while a device computes them."""

    def overlap(self, work: Callable[[], None]) -> None:
        """Lets every step call `work` when the device has its tasks, before it waits for them."""
        ...


@runtime_checkable
class ChoosingModel(RowModel, OverlappingModel, Protocol):
    """A model whose single steps can return tokens instead of logits, which take long to copy."""

    def most_likely(
        self, tokens: NDArray[np.int64], write_positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Runs a step of one token per row, `[rows]`; see `step`.

        Returns the most likely token of every row and the natural log of its probability, both
        `[rows]`.
        """
        ...


def no_work() -> None:
    """The work that a step overlaps with if it is given none."""


@runtime_checkable
class JoiningModel(Protocol):
    """A rank's model that must be connected to those of the other ranks."""

    def join(self, communicator: Communicator) -> None:
        """Connects the models of all ranks, which are all loaded."""
        ...
