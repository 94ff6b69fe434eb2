"""Greedy decoding and sampling, with one sequence per prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.interface import GreedyModel
from mpt_trt.generation.config import Generated, GenerationConfig, TopLogProbs
from mpt_trt.generation.logits import (
    keep_top_k,
    keep_top_p,
    log_softmax,
    penalize_repetition,
    require_finite_rows,
    top_log_probs,
)
from mpt_trt.generation.stepping import Stepper, is_end

OnToken = Callable[[int, int], bool | None]
"""Called with (row, token) for every new token, including end tokens, as soon as it is chosen.

The row ends when it returns True. All ranks of an engine must end the same rows.
"""

# Lower temperatures have the same effect: only the most likely tokens are left.
LEAST_TEMPERATURE = 1e-30
# Weights that are added up at a time before a token is drawn.
BLOCK = 256


def generate_sequences(
    stepper: Stepper, config: GenerationConfig, on_token: OnToken
) -> Iterator[Sequences]:
    """Continues every prompt with one sequence, greedily or by sampling.

    Yields:
        The growing sequences, the same object after every step.
    """
    sequences = Sequences(len(stepper.prompts.ids), config, on_token)
    model = stepper.model
    if config.is_greedy and not config.top_log_probs and isinstance(model, GreedyModel):
        return _let_model_choose(stepper, model, sequences, config)
    return _choose(stepper, sequences, config)


def _choose(
    stepper: Stepper, sequences: Sequences, config: GenerationConfig
) -> Iterator[Sequences]:
    prompt_tokens = stepper.prompts.vocabulary()
    chooser = TokenChooser(config, range(len(prompt_tokens)))
    logits = stepper.prefill()
    while True:
        seen = np.concatenate([prompt_tokens, sequences.tokens[:, : sequences.count]], axis=1)
        sequences.append(*chooser.choose(logits, seen))
        yield sequences
        if not sequences.go_on:
            return
        step = sequences.count
        logits = stepper.decode(sequences.tokens[:, step - 1], step, sequences.num_live)


def _let_model_choose(
    stepper: Stepper, model: GreedyModel, sequences: Sequences, config: GenerationConfig
) -> Iterator[Sequences]:
    logits = stepper.prefill()
    first = logits.argmax(axis=-1)
    sequences.append(first, _log_probs_of(first, log_softmax(logits)))
    yield sequences
    if not sequences.go_on:
        return
    for chosen, log_probs in stepper.greedy_steps(model, first, config.max_new_tokens - 1):
        stepper.on_step("decode", sequences.num_live)
        sequences.append(chosen, log_probs)
        yield sequences
        if not sequences.go_on:
            return


def _log_probs_of(chosen: NDArray[np.int64], log_probs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Picks each row's log-probability of its chosen token, `[rows]`, from `[rows, vocab]`."""
    return np.take_along_axis(log_probs, chosen[:, None], axis=-1)[:, 0]


class TokenChooser:
    """Chooses the next token of each row, greedily or by sampling.

    streams: one number per row. A row's random numbers depend only on the seed and its number.
    """

    def __init__(self, config: GenerationConfig, streams: Iterable[int]):
        self._config = config
        self._generators = [np.random.default_rng((config.random_seed, one)) for one in streams]

    def choose(
        self, logits: NDArray[np.float32], seen: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], list[TopLogProbs]]:
        """Chooses a token per row.

        Args:
            logits: `[rows, vocab]`.
            seen: `[rows, n]`, the tokens that the repetition penalty applies to.

        Returns:
            The tokens `[rows]`, their log-probabilities `[rows]` before any penalty, temperature or
            filter, and the requested most likely tokens of each row.
        """
        rows = range(len(logits))
        chosen = np.array([self.token(row, logits[row], seen[row]) for row in rows], np.int64)
        log_probs = log_softmax(logits)
        top = top_log_probs(log_probs, self._config.top_log_probs)
        return chosen, _log_probs_of(chosen, log_probs), top

    def token(self, row: int, logits: NDArray[np.float32], seen: NDArray[np.int64]) -> int:
        """Chooses a row's token. logits: `[vocab]`. seen: `[n]`, as in `choose`.

        Raises FloatingPointError when the logits have no finite maximum.
        """
        config = self._config
        scores = penalize_repetition(logits, seen, config.repetition_penalty)
        if config.top_k == 1:
            best = int(scores.argmax())
            # NaN and infinity are also the highest of a row.
            require_finite_rows(scores[best])
            return best
        return _drawn(scores, config, self._generators[row].random())


def _drawn(scores: NDArray[np.float32], config: GenerationConfig, part: float) -> int:
    """Draws a token by its scores `[vocab]`: temperature, then top-k, then top-p.

    part: random number from [0, 1), at which the cumulative distribution is inverted.
    """
    temperature, highest = max(config.temperature, LEAST_TEMPERATURE), scores.max()
    require_finite_rows(highest)
    likely, rest = None, 0.0
    if 0 < config.top_k < len(scores):
        lowest = np.partition(scores, -config.top_k)[-config.top_k]
        likely = np.flatnonzero(scores >= lowest)
    else:
        # In float32, which is several times as fast. No score is above 0, so that a very low
        # temperature makes none overflow.
        weights = scores - highest
        if temperature != 1:
            with np.errstate(over="ignore"):
                weights /= temperature
        np.exp(weights, out=weights)
        if not 0 < config.top_p < 1:
            return _inverted(weights, part)
        likely, rest = _most_likely(weights, config.top_p)
    exact = (scores[likely].astype(np.float64) - highest) / temperature
    kept = keep_top_p(keep_top_k(exact, config.top_k), config.top_p, rest)
    return int(likely[_inverted(np.exp(kept), part)])


def _most_likely(weights: NDArray[np.float32], top_p: float) -> tuple[NDArray[np.int64], float]:
    """Finds tokens, in order, that include all that top-p keeps, and the sum of other weights.

    Few are left, so that they need not be sorted in float64 with the whole vocabulary.
    """
    total = weights.sum(dtype=np.float64)
    # Smaller by more than the rounding of float32.
    allowed = (1 - top_p) * total * (1 - 1e-5)
    for divisor in (1e2, 1e3, 1e4, 1e5):
        likely = np.flatnonzero(weights > allowed / divisor)
        rest = total - weights[likely].sum(dtype=np.float64)
        if rest <= allowed:
            return likely, max(rest, 0.0)
    return np.arange(len(weights)), 0.0


def _inverted(weights: NDArray[np.floating], part: float) -> int:
    """Finds the token at which the sum of weights `[vocab]` exceeds `part` of the total."""
    # First among blocks: adding up all weights one after another takes several times as long.
    starts = np.arange(0, len(weights), BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    point = part * blocks[-1]
    block = _first_above(blocks, point)
    within = np.cumsum(weights[starts[block] : starts[block] + BLOCK], dtype=np.float64)
    return int(starts[block]) + _first_above(within, point - (blocks[block - 1] if block else 0))


def _first_above(sums: NDArray[np.float64], point: float) -> int:
    """Finds the first of increasing sums above a point, with a weight above 0."""
    # Rounding may leave none; then the last weight above 0 is meant.
    return int(min(np.searchsorted(sums, point, side="right"), np.searchsorted(sums, sums[-1])))


class Sequences:
    """New tokens of every prompt, one growing sequence each.

    tokens, log_probs: `[batch, max_new_tokens]`, of which the first `count` columns are filled.
    top: the most likely tokens, by step and prompt; [] if they were not requested.
    """

    def __init__(self, batch: int, config: GenerationConfig, on_token: OnToken):
        self.tokens = np.full((batch, config.max_new_tokens), config.pad_id, dtype=np.int64)
        self.log_probs = np.zeros((batch, config.max_new_tokens))
        self.top: list[list[TopLogProbs]] = []
        self._lengths = np.zeros(batch, dtype=np.int64)
        self._live = np.ones(batch, dtype=bool)
        self._config, self._on_token = config, on_token
        self.count = 0

    @property
    def num_live(self) -> int:
        return int(self._live.sum())

    @property
    def go_on(self) -> bool:
        """Returns whether another token is needed."""
        return self.count < self._config.max_new_tokens and self.num_live > 0

    def append(
        self,
        chosen: NDArray[np.int64],
        log_probs: NDArray[np.floating],
        top: list[TopLogProbs] | None = None,
    ) -> None:
        """Appends a token to every sequence that has not ended. All are per row."""
        live = self._live
        self.tokens[live, self.count] = chosen[live]
        self.log_probs[live, self.count] = log_probs[live]
        if self._config.top_log_probs and top is not None:
            self.top.append(top)
        self._lengths += live
        self.count += 1
        ended = is_end(chosen, self._config)
        for row in np.flatnonzero(live):
            if self._on_token(int(row), int(chosen[row])):
                ended[row] = True
        self._live = live & ~ended

    def generated(self) -> list[list[Generated]]:
        return [[self._generated(row)] for row in range(len(self.tokens))]

    def _generated(self, row: int) -> Generated:
        length = int(self._lengths[row])
        log_probs = self.log_probs[row, :length]
        return Generated(
            tokens=tuple(self.tokens[row, :length].tolist()),
            cumulative_log_prob=float(log_probs.sum()),
            log_probs=tuple(log_probs.tolist()),
            top_log_probs=tuple(step[row] for step in self.top[:length]),
        )
