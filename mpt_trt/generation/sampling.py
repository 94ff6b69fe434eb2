"""Greedy decoding and sampling, with one sequence per prompt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.interface import GreedyModel
from mpt_trt.generation.config import Generated, GenerationConfig
from mpt_trt.generation.logits import (
    keep_top_k,
    keep_top_p,
    log_softmax,
    penalize_repetition,
    softmax,
)
from mpt_trt.generation.stepping import Stepper, is_end

OnToken = Callable[[int, int], bool | None]
"""Called with (row, token) for every new token, including end tokens, as soon as it is chosen.

The row ends when it returns True. All ranks of an engine must end the same rows.
"""

_Chooser = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""Maps scores `[rows, vocab]` to one token per row `[rows]`."""


def generate_sequences(
    stepper: Stepper, config: GenerationConfig, on_token: OnToken
) -> list[list[Generated]]:
    """Continues every prompt with one sequence, greedily or by sampling."""
    sequences = _Sequences(len(stepper.prompts.ids), config, on_token)
    model = stepper.model
    if config.is_greedy and isinstance(model, GreedyModel):
        _let_model_choose(stepper, model, sequences, config)
    else:
        _choose(stepper, sequences, config)
    return sequences.generated()


def _choose(stepper: Stepper, sequences: _Sequences, config: GenerationConfig) -> None:
    prompt_tokens = stepper.prompts.vocabulary()
    choose = _chooser(config, len(prompt_tokens))
    logits = stepper.prefill()
    while True:
        seen = np.concatenate([prompt_tokens, sequences.tokens[:, : sequences.count]], axis=1)
        chosen = choose(penalize_repetition(logits, seen, config.repetition_penalty))
        sequences.append(chosen, _log_probs_of(chosen, logits))
        if not sequences.go_on:
            return
        step = sequences.count
        logits = stepper.decode(sequences.tokens[:, step - 1], step, sequences.num_live)


def _let_model_choose(
    stepper: Stepper, model: GreedyModel, sequences: _Sequences, config: GenerationConfig
) -> None:
    logits = stepper.prefill()
    first = logits.argmax(axis=-1)
    sequences.append(first, _log_probs_of(first, logits))
    if not sequences.go_on:
        return
    for chosen, log_probs in stepper.greedy_steps(model, first, config.max_new_tokens - 1):
        stepper.on_step("decode", sequences.num_live)
        sequences.append(chosen, log_probs)
        if not sequences.go_on:
            return


def _log_probs_of(chosen: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Computes the natural log-probability of the chosen token of each row, `[rows]`."""
    return np.take_along_axis(log_softmax(logits), chosen[:, None], axis=-1)[:, 0]


def _chooser(config: GenerationConfig, batch: int) -> _Chooser:
    if config.top_k == 1:
        return lambda scores: scores.argmax(axis=-1)
    # One generator per row, so that a row's numbers do not depend on other rows.
    generators = [np.random.default_rng((config.random_seed, row)) for row in range(batch)]
    return lambda scores: _draw(_sampling_probabilities(scores, config), generators)


def _sampling_probabilities(
    scores: NDArray[np.float32], config: GenerationConfig
) -> NDArray[np.float64]:
    """Computes probabilities `[rows, vocab]` after temperature, then top-k, then top-p."""
    # float64, so that a very low temperature does not make scores overflow.
    warm = scores.astype(np.float64) / config.temperature
    return softmax(keep_top_p(keep_top_k(warm, config.top_k), config.top_p))


def _draw(
    probabilities: NDArray[np.float64], generators: list[np.random.Generator]
) -> NDArray[np.int64]:
    """Draws one token per row, by inverting the cumulative distribution at a number from [0, 1)."""
    cumulative = np.cumsum(probabilities, axis=-1)
    # This makes the last entries exactly 1, so a token with a probability above 0 is always drawn.
    cumulative /= cumulative[:, -1:]
    drawn = np.array([generator.random() for generator in generators])
    return (cumulative <= drawn[:, None]).sum(axis=-1)


class _Sequences:
    """New tokens of every prompt, one growing sequence each."""

    def __init__(self, batch: int, config: GenerationConfig, on_token: OnToken):
        self.tokens = np.full((batch, config.max_new_tokens), config.pad_id, dtype=np.int64)
        self._lengths = np.zeros(batch, dtype=np.int64)
        self._log_probs = np.zeros(batch)
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

    def append(self, chosen: NDArray[np.int64], log_probs: NDArray[np.floating]) -> None:
        """Appends a token to every sequence that has not ended. Both are `[rows]`."""
        live = self._live
        self.tokens[live, self.count] = chosen[live]
        self._lengths += live
        self._log_probs[live] += log_probs[live]
        ended = is_end(chosen, self._config)
        for row in np.flatnonzero(live):
            if self._on_token(int(row), int(chosen[row])):
                ended[row] = True
        self._live = live & ~ended
        self.count += 1

    def generated(self) -> list[list[Generated]]:
        return [
            [Generated(tuple(row[:length].tolist()), float(log_prob))]
            for row, length, log_prob in zip(
                self.tokens, self._lengths, self._log_probs, strict=True
            )
        ]
