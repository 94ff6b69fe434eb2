"""Runs several ranks of an engine: rank 0 chooses the steps, and the others follow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.interface import ChoosingModel, RowModel
from mpt_trt.system.mpi import Communicator

END, IDLE = "end", "idle"
# Messages of an idle rank 0 in the time after which the others give up on it.
IDLE_MESSAGES = 4


class LeadingModel:
    """Rank 0's model, whose every call the other ranks make as well (see `follow`).

    idle_seconds: longest time without a call, after which `keep_waiting` is due.
    """

    def __init__(self, model: RowModel, ranks: Communicator):
        self._model, self._ranks = model, ranks
        self.vocab_size, self.capacity = model.vocab_size, model.capacity
        self.max_batch_size, self.max_step_tokens = model.max_batch_size, model.max_step_tokens
        self.idle_seconds = ranks.patience_seconds / IDLE_MESSAGES

    def start(self, batch_size: int) -> None:
        self._tell("start", batch_size)
        self._model.start(batch_size)

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_positions: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        self._tell("step", input_ids, write_positions, logit_positions)
        return self._model.step(input_ids, write_positions, logit_positions)

    def reorder(self, rows: NDArray[np.int64]) -> None:
        self._tell("reorder", rows)
        self._model.reorder(rows)

    def select_rows(self, first: int, count: int) -> None:
        self._tell("select_rows", first, count)
        self._model.select_rows(first, count)

    def copy_row(self, source: int, target: int) -> None:
        self._tell("copy_row", source, target)
        self._model.copy_row(source, target)

    def keep_waiting(self) -> None:
        """Tells the others that there is nothing to do, before they give up on this rank."""
        self._tell(IDLE)

    def end(self) -> None:
        """Lets `follow` return on the other ranks."""
        self._tell(END)

    def _tell(self, name: str, *arguments: object) -> None:
        self._ranks.exchange((name, arguments))


class LeadingChoosingModel(LeadingModel):
    """Rank 0's model if it chooses tokens itself and leaves the host free meanwhile."""

    def __init__(self, model: ChoosingModel, ranks: Communicator):
        super().__init__(model, ranks)
        self._choosing_model = model

    def overlap(self, work: Callable[[], None]) -> None:
        self._choosing_model.overlap(work)

    def most_likely(
        self, tokens: NDArray[np.int64], write_positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        self._tell("most_likely", tokens, write_positions)
        return self._choosing_model.most_likely(tokens, write_positions)


def lead(model: RowModel, ranks: Communicator) -> LeadingModel:
    """Makes the model that rank 0 uses, while the other ranks `follow`."""
    if isinstance(model, ChoosingModel):
        return LeadingChoosingModel(model, ranks)
    return LeadingModel(model, ranks)


def follow(model: RowModel, ranks: Communicator) -> None:
    """Makes every call that rank 0's `LeadingModel` makes, until it ends."""
    while True:
        name, arguments = ranks.exchange(None)[0]
        if name == END:
            return
        if name != IDLE:
            getattr(model, name)(*arguments)
