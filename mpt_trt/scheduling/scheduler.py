"""Runs steps of a model for requests that come and go.

Each running request has a cache row. The first rows are in use: a new request takes the row after
the last one, or the row of an ended request. If no request waits for that row, the last row moves
there.

A step either reads pieces of prompts in adjacent rows, with only these selected, or advances all
rows that generate. The two kinds alternate, and prompts take turns, so no request waits longer than
one such step. In a step that generates, rows of partly read prompts take part with a token that the
next piece overwrites, so that rows need not be sorted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.interface import ChoosingModel, OverlappingModel, RowModel, no_work
from mpt_trt.errors import MptTrtError
from mpt_trt.generation.config import GenerationConfig, TopLogProbs
from mpt_trt.generation.generate import require_fitting
from mpt_trt.generation.logits import (
    log_softmax,
    require_finite,
    require_finite_rows,
    top_log_probs,
)
from mpt_trt.generation.sampling import TokenChooser

# Maximum number of prompt tokens per step if their log-probabilities are requested: for a large
# vocabulary, those of more tokens take long to compute, and much memory.
PIECE_LOGITS = 64
# Prompt tokens per step of several prompts on a GPU, which reads so many in two to three times the
# time of 128. A CPU reads them no faster together.
GPU_STEP_TOKENS = 1024


@dataclass(frozen=True)
class NewToken:
    """A new token of a request, or a token of its prompt.

    log_prob: natural log-probability before any penalty, temperature or filter; None if it was not
    requested, and for the first token of a prompt. top: the requested most likely tokens.
    """

    token: int
    log_prob: float | None
    top: TopLogProbs = ()


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue.

    prompt: token ids. config: settings, without beams. stream: number of the random stream, so that
    several completions of a prompt differ. wants_log_probs: whether tokens come with
    log-probabilities. on_token: called with every new token; the request ends when it returns True.
    on_end: called once at the end, with the error or with None; not after `cancel`. on_prompt: if
    given, called with the prompt's tokens and their log-probabilities when the prompt has been
    read. wants_tokens: whether tokens are generated; otherwise the request then ends.
    """

    prompt: tuple[int, ...]
    config: GenerationConfig
    on_token: Callable[[NewToken], bool | None]
    on_end: Callable[[Exception | None], None]
    stream: int = 0
    wants_log_probs: bool = False
    on_prompt: Callable[[tuple[NewToken, ...]], None] | None = None
    wants_tokens: bool = True


@dataclass(eq=False)
class _Row:
    """A request in a cache row.

    num_read: prompt tokens in the cache. prompt_tokens: those with known log-probabilities.
    """

    request: Request
    chooser: TokenChooser
    num_read: int = 0
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: list[NewToken] = field(default_factory=list)

    @property
    def is_read(self) -> bool:
        return self.num_read == len(self.request.prompt)

    @property
    def wants_prompt(self) -> bool:
        """Returns whether log-probabilities of the prompt are requested."""
        return self.request.on_prompt is not None

    @property
    def next_input(self) -> tuple[int, int]:
        """Returns token and position of the row in a step that generates."""
        if not self.is_read:
            # The next piece of the prompt overwrites this token in the cache.
            return self.request.prompt[self.num_read], self.num_read
        return self.tokens[-1], self.num_read + len(self.tokens) - 1

    @property
    def takes_most_likely(self) -> bool:
        """Returns whether the next token is the one with the highest logit."""
        return self.request.config.is_greedy and not self.request.wants_log_probs


class Scheduler:
    """Runs requests on a model. Not thread-safe: see `Worker`.

    num_read, num_generated: counters since the start, of tokens of prompts and of new ones.
    """

    def __init__(
        self,
        model: RowModel,
        piece_tokens: int | None = None,
        max_logits: int | None = None,
        deliver: Callable[[], None] | None = None,
    ):
        """Reserves the model's whole cache.

        piece_tokens: maximum number of prompt tokens per step; None: the longest piece of a prompt
        that the model reads, or on a GPU several of together GPU_STEP_TOKENS.
        max_logits: maximum number of tokens per step whose logits the model returns; None: all.
        deliver: called in each step, while a device computes it if there is one: time to pass on
        what requests got in the last one. After the last step, the caller calls it.

        Raises MptTrtError when the model cannot read a prompt into a single row.
        """
        most = model.max_step_tokens
        self._piece_tokens = most if piece_tokens is None else min(piece_tokens, most)
        if self._piece_tokens < 1:
            raise MptTrtError(f"piece_tokens is {piece_tokens}; it must be at least 1")
        self._model = model
        self._choosing_model = model if isinstance(model, ChoosingModel) else None
        self._overlaps = isinstance(model, OverlappingModel)
        self._step_tokens = piece_tokens or (GPU_STEP_TOKENS if self._overlaps else 1)
        self._piece_logits = min(self._piece_tokens, PIECE_LOGITS, max_logits or PIECE_LOGITS)
        self.deliver = deliver or no_work
        if isinstance(model, OverlappingModel):
            model.overlap(self.deliver)
        self._waiting: deque[Request] = deque()
        self._rows: list[_Row] = []
        self._readers: deque[_Row] = deque()
        self._has_just_read = False
        self._selected: tuple[int, int] | None = None
        self.num_generated = self.num_read = 0
        self.restart()

    def restart(self) -> None:
        """Empties the cache, after a failed step."""
        rows = self._model.max_batch_size
        self._model.start(rows)
        self._selected = None
        if rows > 1:
            self._select_rows(1, 1)

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self._rows and not self._waiting

    def require_fitting(self, request: Request) -> None:
        """Raises MptTrtError when the model cannot run the request."""
        if request.config.num_beams > 1:
            raise MptTrtError(
                f"num_beams is {request.config.num_beams}; requests that share a batch need 1"
            )
        require_fitting(self._model, [request.prompt], request.config, request.wants_tokens)

    def add(self, request: Request) -> None:
        """Appends a request to the queue. `require_fitting` must have accepted it."""
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request without calling `on_end`; does nothing if it has ended.

        Raises what the model raises when it cannot move another row there.
        """
        if request in self._waiting:
            self._waiting.remove(request)
        for row in self._rows:
            if row.request is request:
                self._remove(row)

    def fail(self, error: Exception, with_waiting: bool) -> None:
        """Ends all running requests, and waiting ones if `with_waiting`, with an error."""
        ended = [row.request for row in self._rows]
        self._rows, self._readers = [], deque()
        if with_waiting:
            ended += self._waiting
            self._waiting.clear()
        for request in ended:
            request.on_end(error)

    def run_once(self) -> None:
        """Runs one step, if there is anything to do."""
        self._fill_rows()
        if not self._overlaps:
            self.deliver()
        is_generating = len(self._rows) > len(self._readers)
        if self._readers and not (self._has_just_read and is_generating):
            self._has_just_read = True
            self._read_pieces(self._readers_of_a_step())
        elif self._rows:
            self._has_just_read = False
            self._generate()

    def _fill_rows(self) -> None:
        """Gives free rows to waiting requests."""
        while self._waiting and len(self._rows) < self._model.max_batch_size:
            row = self._new_row(self._waiting.popleft())
            self._rows.append(row)
            self._readers.append(row)

    @staticmethod
    def _new_row(request: Request) -> _Row:
        return _Row(request, TokenChooser(request.config, [request.stream]))

    def _remove(self, row: _Row) -> None:
        """Frees a row for a waiting request, or moves the last row to it."""
        index = self._rows.index(row)
        if row in self._readers:
            self._readers.remove(row)
        if self._waiting:
            self._rows[index] = self._new_row(self._waiting.popleft())
            self._readers.append(self._rows[index])
            return
        # If the model fails to copy, `fail` finds the moved request among the running ones.
        last = self._rows[index] = self._rows[-1]
        self._rows.pop()
        if last is not row:
            self._model.copy_row(len(self._rows), index)

    def _readers_of_a_step(self) -> list[_Row]:
        """Finds the prompt whose turn it is, and prompts in the rows after it to read with it."""
        first = self._readers[0]
        length, index = len(self._next_piece(first)), self._rows.index(first)
        found = [first]
        for row in self._rows[index + 1 :]:
            fits = (len(found) + 1) * length <= self._step_tokens
            # A short piece is padded.
            fits = fits and row.num_read + length <= self._model.capacity
            if not fits or row.is_read or first.wants_prompt or row.wants_prompt:
                break
            found.append(row)
        return found

    def _next_piece(self, row: _Row) -> tuple[int, ...]:
        length = self._piece_logits if row.wants_prompt else self._piece_tokens
        return row.request.prompt[row.num_read : row.num_read + length]

    def _read_pieces(self, rows: list[_Row]) -> None:
        """Reads the next pieces of adjacent rows' prompts; other prompts follow in turn."""
        length = len(self._next_piece(rows[0]))
        pieces = [self._next_piece(row)[:length] for row in rows]
        # The row's next tokens overwrite its padding, before any query sees it.
        input_ids = np.zeros((len(rows), length), np.int64)
        wanted: list[tuple[int, int]] = []
        ends = []
        for number, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
            input_ids[number, : len(piece)] = piece
            is_last = row.num_read + len(piece) == len(row.request.prompt)
            first = 0 if row.wants_prompt else len(piece) - is_last
            wanted += [(number, index) for index in range(first, len(piece))]
            ends.append(len(wanted))
        self._select_rows(self._rows.index(rows[0]), len(rows))
        logits = self._model.step(
            input_ids,
            np.array([row.num_read for row in rows], np.int64),
            np.array(wanted, np.int64).reshape(-1, 2),
        )
        for row, piece, own in zip(rows, pieces, np.split(logits, ends[:-1]), strict=True):
            self._end_piece(row, len(piece), own)

    def _end_piece(self, row: _Row, length: int, logits: NDArray[np.float32]) -> None:
        """Takes the logits of a piece of a prompt, of which `length` tokens were read."""
        start = row.num_read
        row.num_read += length
        self.num_read += length
        self._readers.remove(row)
        try:
            self._report_prompt(row, start, logits)
        except FloatingPointError as error:
            self._end(row, error)
            return
        if not row.is_read:
            self._readers.append(row)
        elif row.request.wants_tokens:
            self._take([row], logits[-1:])
        else:
            self._end(row, None)

    def _select_rows(self, first: int, count: int) -> None:
        """Selects the rows of the next steps, if they are others."""
        # Models bind the cache of every layer anew, and ranks tell each other.
        if self._selected != (first, count):
            self._model.select_rows(first, count)
            self._selected = first, count

    @staticmethod
    def _report_prompt(row: _Row, start: int, logits: NDArray[np.float32]) -> None:
        """Adds log-probabilities of the prompt's tokens, if they are requested.

        start: position of the first token with logits, which are those of the next one.
        """
        request = row.request
        if request.on_prompt is None:
            return
        if start == 0:
            row.prompt_tokens.append(NewToken(request.prompt[0], None))
        following = request.prompt[start + 1 : start + 1 + len(logits)]
        log_probs = log_softmax(require_finite(logits[: len(following)]))
        tops = top_log_probs(log_probs, request.config.top_log_probs)
        for token, own, top in zip(following, log_probs, tops, strict=True):
            row.prompt_tokens.append(NewToken(token, float(own[token]), top))
        if row.is_read:
            request.on_prompt(tuple(row.prompt_tokens))

    def _generate(self) -> None:
        """Advances every row with a complete prompt by one token."""
        rows = list(self._rows)
        inputs = np.array([row.next_input for row in rows], np.int64)
        tokens, positions = np.ascontiguousarray(inputs.T)
        self._select_rows(0, len(rows))
        generating = [number for number, row in enumerate(rows) if row.is_read]
        choosing = self._choosing_model
        if choosing is not None and all(rows[number].takes_most_likely for number in generating):
            self._take_most_likely(rows, generating, *choosing.most_likely(tokens, positions))
            return
        wanted = np.zeros((len(rows), 2), np.int64)
        wanted[:, 0] = range(len(rows))
        logits = self._model.step(tokens[:, None], positions, wanted)
        if len(generating) < len(rows):
            logits = logits[generating]
        self._take([rows[number] for number in generating], logits)

    def _take_most_likely(
        self,
        rows: list[_Row],
        generating: list[int],
        tokens: NDArray[np.int64],
        log_probs: NDArray[np.float32],
    ) -> None:
        """Takes the tokens that the model has chosen for the rows that generate."""
        for number in generating:
            try:
                require_finite_rows(log_probs[number])
            except FloatingPointError as error:
                self._end(rows[number], error)
                continue
            self._append(rows[number], NewToken(int(tokens[number]), None))

    def _take(self, rows: list[_Row], logits: NDArray[np.float32]) -> None:
        """Chooses a token for each row from its logits, and ends rows."""
        for row, own in zip(rows, logits, strict=True):
            try:
                new = self._choose(row, own)
            except Exception as error:
                self._end(row, error)
                continue
            self._append(row, new)

    def _append(self, row: _Row, new: NewToken) -> None:
        """Adds a token to a row, and ends the row if it is the last one."""
        row.tokens.append(new.token)
        self.num_generated += 1
        config = row.request.config
        if (
            row.request.on_token(new)
            or new.token in config.end_ids
            or len(row.tokens) == config.max_new_tokens
        ):
            self._end(row, None)

    @staticmethod
    def _choose(row: _Row, logits: NDArray[np.float32]) -> NewToken:
        request = row.request
        is_penalized = request.config.repetition_penalty != 1
        seen = np.array([*request.prompt, *row.tokens] if is_penalized else [], np.int64)
        if not request.wants_log_probs:
            return NewToken(row.chooser.token(0, logits, seen), None)
        [token], [log_prob], [top] = row.chooser.choose(logits[None], seen[None])
        return NewToken(int(token), float(log_prob), top)

    def _end(self, row: _Row, error: Exception | None) -> None:
        try:
            self._remove(row)
        finally:
            # The row is gone even if the model has failed to move another one there.
            row.request.on_end(error)
