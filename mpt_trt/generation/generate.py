"""Token generation over any runtime: greedy, sampling and beam search.

All that is asked of a runtime is the three methods of `StepModel`. What comes out follows
Hugging Face transformers 5.14 (`GenerationMixin._sample`, `GenerationMixin._beam_search` with
`early_stopping=False`, and the logits processors), so for the same logits it is the same token for
token.

Shapes: `batch` counts prompts, `beams` the hypotheses followed per prompt, `rows` cache rows
(`batch * beams`, the beams of one prompt side by side), `vocab` the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.interface import GreedyModel, StepModel
from mpt_trt.errors import MptTrtError

OnToken = Callable[[int, int], None]
"""Called with (row, token) for every new token, as soon as it is chosen, end token included."""

OnStep = Callable[[str, int], None]
"""Called with (phase, tokens) when a step of the model has returned.

`phase` is "prefill" or "decode". `tokens` is what the step was good for: in prefill the prompt
tokens it read (padding not counted), in decode the rows still being generated. So the prefill
counts add up to the prompt lengths, and without beams the decode counts add up to the new tokens
less one a prompt, the one that prefill already gave.
"""


@dataclass(frozen=True)
class GenerationConfig:
    """How to choose tokens.

    `top_k=1` is greedy (or, with `num_beams` > 1, beam search) whatever `temperature` and `top_p`
    say. Any other `top_k` samples: repetition penalty, temperature, top-k and top-p, in that order.

    Raises:
        MptTrtError: a field is outside its range; names the field, the value and the range.
    """

    max_new_tokens: int
    end_id: int | None
    """The token that ends a sequence; None: every sequence gets `max_new_tokens` tokens."""
    pad_id: int
    """Fed to the model where a row has no token. It never reaches the output as padding."""
    num_beams: int = 1
    temperature: float = 1.0
    top_k: int = 1
    """Sample among the k most likely tokens; 0: no limit."""
    top_p: float = 0.0
    """Sample among the fewest tokens whose probabilities add up to top_p; 0 or 1: off."""
    repetition_penalty: float = 1.0
    """> 1 makes tokens of the prompt and of the output so far less likely (arXiv:1909.05858)."""
    length_penalty: float = 1.0
    """A hypothesis is ranked by its log-probability / (number of new tokens ** length_penalty)."""
    random_seed: int = 0

    def __post_init__(self) -> None:
        positive = "a finite number above 0"
        rules = (
            ("max_new_tokens", _is_count(self.max_new_tokens, 1), "an integer of at least 1"),
            ("end_id", self.end_id is None or _is_count(self.end_id, 0), "None or a token id >= 0"),
            ("pad_id", _is_count(self.pad_id, 0), "a token id >= 0"),
            ("num_beams", _is_count(self.num_beams, 1), "an integer of at least 1"),
            ("temperature", 0 < self.temperature < math.inf, positive),
            ("top_k", _is_count(self.top_k, 0), "an integer of at least 0 (0: no limit)"),
            ("top_p", 0 <= self.top_p <= 1, "a number from 0 to 1 (0 and 1: off)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, positive),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("random_seed", _is_count(self.random_seed, 0), "an integer of at least 0"),
        )
        for field, legal, legal_range in rules:
            if not legal:
                raise MptTrtError(f"{field} is {getattr(self, field)!r}; it must be {legal_range}")
        if self.num_beams > 1 and self.top_k != 1:
            raise MptTrtError(
                f"top_k is {self.top_k} with num_beams {self.num_beams}; it must be 1, because beam"
                " search does not sample (or set num_beams to 1)"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken as the model has it."""
        return self.top_k == 1 and self.num_beams == 1 and self.repetition_penalty == 1


@dataclass(frozen=True)
class Generated:
    """One continuation of a prompt."""

    tokens: tuple[int, ...]
    """The new tokens only: no prompt, no padding, the end token included if it was produced."""
    cumulative_log_prob: float
    """Natural log of the probability the model itself gives these tokens, before any penalty,
    temperature or filter."""
    score: float | None = None
    """What beam search ranks by (repetition penalty in, divided by length ** length_penalty);
    None without beams."""


def generate(
    model: StepModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    on_token: OnToken | None = None,
    on_step: OnStep | None = None,
) -> list[list[Generated]]:
    """Continues every prompt. Prompts may differ in length; no row's output depends on another's.

    Returns:
        Per prompt, `config.num_beams` hypotheses, best first.

    Raises:
        MptTrtError: the request does not fit the model (found before the model is touched), or
            `on_token` is given with beams.
        FloatingPointError: the model returned logits that no token can be chosen from.
    """
    if on_token is not None and config.num_beams > 1:
        raise MptTrtError(
            f"streaming needs num_beams 1, and it is {config.num_beams}: until beam search ends no"
            " token is certain; leave out on_token or set num_beams to 1"
        )
    if len(prompts) == 0:
        return []
    rows = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    _check_vocabulary(model, rows, config)
    _check_capacity(model, rows, config)
    driver = _Driver(model, _Prompts.padded(rows, config.pad_id), on_step or _ignore)
    if config.num_beams > 1:
        return _beam_search(driver, config)
    return _single_sequences(driver, config, on_token or _ignore)


# Checks


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def _ignore(*_: object) -> None:
    """The callback of a caller that gave none."""


def _check_vocabulary(
    model: StepModel, prompts: list[NDArray[np.int64]], config: GenerationConfig
) -> None:
    legal = f"the vocabulary is 0..{model.vocab_size - 1}"
    for field, token in (("end_id", config.end_id), ("pad_id", config.pad_id)):
        if token is not None and token >= model.vocab_size:
            raise MptTrtError(f"{field} is {token} and {legal}; take it from the model's tokenizer")
    for index, prompt in enumerate(prompts):
        if prompt.size == 0:
            raise MptTrtError(f"prompt {index} is empty; it must hold at least 1 token")
        strange = prompt[(prompt < 0) | (prompt >= model.vocab_size)]
        if strange.size:
            raise MptTrtError(
                f"prompt {index} holds token {strange[0]} and {legal};"
                " encode it with the model's own tokenizer"
            )
    if config.num_beams > 1 and 2 * config.num_beams > model.vocab_size:
        raise MptTrtError(
            f"num_beams is {config.num_beams}, more than half the vocabulary of"
            f" {model.vocab_size} tokens; it must be at most {model.vocab_size // 2}"
        )


def _check_capacity(
    model: StepModel, prompts: list[NDArray[np.int64]], config: GenerationConfig
) -> None:
    for index, prompt in enumerate(prompts):
        needed = prompt.size + config.max_new_tokens
        if needed > model.capacity:
            raise MptTrtError(
                f"prompt {index} has {prompt.size} tokens, which with max_new_tokens"
                f" {config.max_new_tokens} makes {needed}, but a cache row holds {model.capacity};"
                " shorten the prompt, lower max_new_tokens or build for longer sequences"
            )
    needed = len(prompts) * config.num_beams
    if needed > model.max_batch_size:
        raise MptTrtError(
            f"{len(prompts)} prompts with num_beams {config.num_beams} need {needed} cache rows,"
            f" but the model has {model.max_batch_size}; send fewer prompts at a time, lower"
            " num_beams or build for a larger batch"
        )


# Driving the model


@dataclass(frozen=True)
class _Prompts:
    """A batch of prompts."""

    ids: NDArray[np.int64]  # [batch, longest], padded on the right
    lengths: NDArray[np.int64]  # [batch]

    @classmethod
    def padded(cls, prompts: list[NDArray[np.int64]], pad_id: int) -> _Prompts:
        lengths = np.array([prompt.size for prompt in prompts], dtype=np.int64)
        ids = np.full((len(prompts), lengths.max()), pad_id, dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: prompt.size] = prompt
        return cls(ids, lengths)

    def vocabulary(self) -> NDArray[np.int64]:
        """The ids that occur in each prompt, `[batch, longest]`."""
        # The padding repeats the prompt's first token, because the pad id did not occur.
        is_prompt = np.arange(self.ids.shape[1]) < self.lengths[:, None]
        return np.where(is_prompt, self.ids, self.ids[:, :1])


@dataclass(frozen=True)
class _Driver:
    """Steps the model through prefill and decode."""

    model: StepModel
    prompts: _Prompts
    on_step: OnStep

    def prefill(self) -> NDArray[np.float32]:
        """Reads all prompts; returns the logits at the last token of each, `[batch, vocab]`.

        All rows go through their prompts at the same offset. A row shorter than the longest gets
        padding behind its end. Nothing sees it: decode starts writing at the row's own end, and a
        query only looks back.
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
        """Feeds the newest token of each row, `[rows]`; returns its logits, `[rows, vocab]`.

        It is the `num_generated`-th token behind the prompt, in every row. Rows that are done go on
        with the others; their positions stay in the cache because every row was checked to have
        room for `max_new_tokens`.
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
        """Up to `count` steps behind the prompts' first new tokens; see `GreedyModel`."""
        for chosen, log_probs in model.greedy_steps(tokens, self.prompts.lengths, count):
            bad = np.flatnonzero(~np.isfinite(log_probs))
            if bad.size:
                raise _not_finite(int(bad[0]))
            yield chosen, log_probs

    def reorder(self, rows: NDArray[np.int64], num_rows: int) -> None:
        """Moves cache rows, unless each of the `num_rows` would stay where it is."""
        if not np.array_equal(rows, np.arange(num_rows)):
            self.model.reorder(rows)


def require_finite(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logits, if each row has a finite maximum (a NaN anywhere makes the maximum NaN)."""
    bad = np.flatnonzero(~np.isfinite(logits.max(axis=-1)))
    if bad.size:
        raise _not_finite(int(bad[0]))
    return logits


def _not_finite(row: int) -> FloatingPointError:
    return FloatingPointError(
        f"the logits of row {row} are not finite; the numbers inside the network overflow"
        " its data type: build in a wider one (bf16 or fp32)"
    )


# Scores


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Natural log-probabilities, `[..., vocab]`, in the type of the logits."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def penalize_repetition(
    scores: NDArray[np.float32], seen: NDArray[np.int64], penalty: float
) -> NDArray[np.float32]:
    """Makes tokens that occurred less likely: score * penalty if negative, score / penalty if not.

    Args:
        scores: `[rows, vocab]`, left as they are.
        seen: `[rows, n]` token ids; one that occurs twice counts once.
    """
    if penalty == 1.0:
        return scores
    old = np.take_along_axis(scores, seen, axis=-1)
    penalized = scores.copy()
    np.put_along_axis(penalized, seen, np.where(old < 0, old * penalty, old / penalty), axis=-1)
    return penalized


def keep_top_k(scores: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """All but the `top_k` highest of each row's scores, `[rows, vocab]`, become -inf.

    Those that tie with the last one stay. 0: all stay.
    """
    vocab = scores.shape[-1]
    if not 0 < top_k < vocab:
        return scores
    lowest = np.partition(scores, vocab - top_k, axis=-1)[:, vocab - top_k, None]
    return np.where(scores < lowest, -np.inf, scores)


def keep_top_p(scores: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """All but the fewest most likely tokens with total probability `top_p` become -inf.

    Counted from the unlikely end: a token goes if it and all less likely ones together have a
    probability of at most 1 - top_p, where of equals the lower id counts as less likely. The most
    likely token always stays. 0 or 1: all stay.

    Args:
        scores: `[rows, vocab]`; probabilities are their softmax.
    """
    if not 0 < top_p < 1:
        return scores
    # Sorting the values, and the ids only where they tie, takes a fifth of a stable argsort's time.
    ascending = np.sort(scores, axis=-1)
    tail = np.cumsum(_softmax(ascending), axis=-1)
    num_dropped = np.minimum((tail <= 1 - top_p).sum(axis=-1, keepdims=True), scores.shape[-1] - 1)
    lowest = np.take_along_axis(ascending, num_dropped, axis=-1)
    below, ties = scores < lowest, scores == lowest
    num_ties_dropped = num_dropped - below.sum(axis=-1, keepdims=True)
    dropped = below | (ties & (np.cumsum(ties, axis=-1) <= num_ties_dropped))
    return np.where(dropped, -np.inf, scores)


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _ends(tokens: NDArray[np.int64], config: GenerationConfig) -> NDArray[np.bool_]:
    """Where `tokens` is the end token."""
    if config.end_id is None:
        return np.zeros(tokens.shape, dtype=bool)
    return tokens == config.end_id


# Greedy and sampling: one sequence per prompt

_Chooser = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""Scores `[rows, vocab]` to one token per row `[rows]`."""


def _chooser(config: GenerationConfig, batch: int) -> _Chooser:
    if config.top_k == 1:
        return lambda scores: scores.argmax(axis=-1)
    # A generator a row, so that a row draws the same numbers whatever the other rows are.
    generators = [np.random.default_rng((config.random_seed, row)) for row in range(batch)]
    return lambda scores: _draw(_sampling_probabilities(scores, config), generators)


def _sampling_probabilities(
    scores: NDArray[np.float32], config: GenerationConfig
) -> NDArray[np.float64]:
    """`[rows, vocab]`: temperature, then top-k, then top-p."""
    # In float64 a very low temperature makes no score overflow.
    warm = scores.astype(np.float64) / config.temperature
    return _softmax(keep_top_p(keep_top_k(warm, config.top_k), config.top_p))


def _draw(
    probabilities: NDArray[np.float64], generators: list[np.random.Generator]
) -> NDArray[np.int64]:
    """One token per row, by inverting the cumulative distribution at a number from [0, 1)."""
    cumulative = np.cumsum(probabilities, axis=-1)
    # This makes the last entries exactly 1, so a token is found, and none of probability 0.
    cumulative /= cumulative[:, -1:]
    drawn = np.array([generator.random() for generator in generators])
    return (cumulative <= drawn[:, None]).sum(axis=-1)


class _Sequences:
    """The new tokens of every prompt, one sequence each, as they come."""

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
        """Whether another token is wanted."""
        return self.count < self._config.max_new_tokens and self.num_live > 0

    def take(self, chosen: NDArray[np.int64], log_probs: NDArray[np.floating]) -> None:
        """Appends a token to every sequence that has not ended. Both are `[rows]`."""
        live = self._live
        self.tokens[live, self.count] = chosen[live]
        self._lengths += live
        self._log_probs[live] += log_probs[live]
        for row in np.flatnonzero(live):
            self._on_token(int(row), int(chosen[row]))
        self._live = live & ~_ends(chosen, self._config)
        self.count += 1

    def generated(self) -> list[list[Generated]]:
        return [
            [Generated(tuple(row[:length].tolist()), float(log_prob))]
            for row, length, log_prob in zip(
                self.tokens, self._lengths, self._log_probs, strict=True
            )
        ]


def _single_sequences(
    driver: _Driver, config: GenerationConfig, on_token: OnToken
) -> list[list[Generated]]:
    sequences = _Sequences(len(driver.prompts.ids), config, on_token)
    model = driver.model
    if config.is_greedy and isinstance(model, GreedyModel):
        _let_model_choose(driver, model, sequences, config)
    else:
        _choose(driver, sequences, config)
    return sequences.generated()


def _choose(driver: _Driver, sequences: _Sequences, config: GenerationConfig) -> None:
    prompt_tokens = driver.prompts.vocabulary()
    choose = _chooser(config, len(prompt_tokens))
    logits = driver.prefill()
    while True:
        seen = np.concatenate([prompt_tokens, sequences.tokens[:, : sequences.count]], axis=1)
        chosen = choose(penalize_repetition(logits, seen, config.repetition_penalty))
        sequences.take(chosen, _log_probs_of(chosen, logits))
        if not sequences.go_on:
            return
        step = sequences.count
        logits = driver.decode(sequences.tokens[:, step - 1], step, sequences.num_live)


def _let_model_choose(
    driver: _Driver, model: GreedyModel, sequences: _Sequences, config: GenerationConfig
) -> None:
    logits = driver.prefill()
    chosen = logits.argmax(axis=-1)
    sequences.take(chosen, _log_probs_of(chosen, logits))
    if not sequences.go_on:
        return
    steps = driver.greedy_steps(model, chosen, config.max_new_tokens - 1)
    for chosen, log_probs in steps:
        driver.on_step("decode", sequences.num_live)
        sequences.take(chosen, log_probs)
        if not sequences.go_on:
            return


def _log_probs_of(chosen: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.floating]:
    """Natural log-probability of a token of each row, `[rows]`."""
    return np.take_along_axis(log_softmax(logits), chosen[:, None], axis=-1)[:, 0]


# Beam search


@dataclass(frozen=True)
class _Hypotheses:
    """`width` sequences of new tokens for each prompt, best first."""

    tokens: NDArray[np.int64]  # [batch, width, max_new_tokens]
    lengths: NDArray[np.int64]  # [batch, width]
    log_probs: NDArray[np.float64]  # [batch, width], the model's own
    scores: NDArray[np.float32]  # [batch, width], to rank by; -inf: no such hypothesis

    @classmethod
    def blank(cls, batch: int, width: int, max_new_tokens: int, score: float) -> _Hypotheses:
        return cls(
            tokens=np.zeros((batch, width, max_new_tokens), dtype=np.int64),
            lengths=np.zeros((batch, width), dtype=np.int64),
            log_probs=np.zeros((batch, width)),
            scores=np.full((batch, width), score, dtype=np.float32),
        )

    def take(self, index: NDArray[np.int64]) -> _Hypotheses:
        """The hypotheses at `index`, `[batch, new width]`."""
        return _Hypotheses(
            tokens=np.take_along_axis(self.tokens, index[:, :, None], axis=1),
            lengths=np.take_along_axis(self.lengths, index, axis=1),
            log_probs=np.take_along_axis(self.log_probs, index, axis=1),
            scores=np.take_along_axis(self.scores, index, axis=1),
        )

    def merged(self, other: _Hypotheses) -> _Hypotheses:
        return _Hypotheses(
            tokens=np.concatenate([self.tokens, other.tokens], axis=1),
            lengths=np.concatenate([self.lengths, other.lengths], axis=1),
            log_probs=np.concatenate([self.log_probs, other.log_probs], axis=1),
            scores=np.concatenate([self.scores, other.scores], axis=1),
        )

    def rescored(self, scores: NDArray[np.float32]) -> _Hypotheses:
        return _Hypotheses(self.tokens, self.lengths, self.log_probs, scores)


def _beam_search(driver: _Driver, config: GenerationConfig) -> list[list[Generated]]:
    """Follows `num_beams` running hypotheses per prompt and keeps as many finished ones.

    Each step extends the running ones, moves those that ended to the finished ones, and closes a
    prompt once its best running one, at its present length, does not beat its worst finished one.
    """
    batch, beams, most = len(driver.prompts.ids), config.num_beams, config.max_new_tokens
    # One empty beam per prompt to begin with; the first step spreads it out.
    running = _Hypotheses.blank(batch, 1, most, score=0.0)
    finished = _Hypotheses.blank(batch, beams, most, score=-np.inf)
    is_open = np.ones(batch, dtype=bool)
    logits = driver.prefill()
    for step in range(most):
        candidates, parents = _extended(running, logits, driver.prompts, config)
        ended = _ends(candidates.tokens[:, :, step], config) | (step + 1 == most)
        scale = float(step + 1) ** config.length_penalty
        finished = _with_finished(finished, candidates, ended & is_open[:, None], scale)
        going_on = candidates.rescored(np.where(ended, -np.inf, candidates.scores))
        best = _top(going_on.scores, beams)
        rows = _cache_rows(np.take_along_axis(parents, best, axis=1), running.scores.shape[1])
        num_rows, running = running.scores.size, going_on.take(best)
        is_open = is_open & (running.scores[:, 0] / scale > finished.scores.min(axis=1))
        if step + 1 == most or not is_open.any():
            break
        driver.reorder(rows, num_rows)
        logits = driver.decode(
            running.tokens[:, :, step].reshape(-1), step + 1, int(is_open.sum()) * beams
        )
    return _ranked(finished)


def _extended(
    running: _Hypotheses,
    logits: NDArray[np.float32],
    prompts: _Prompts,
    config: GenerationConfig,
) -> tuple[_Hypotheses, NDArray[np.int64]]:
    """The best `2 * num_beams` extensions by a token, best first, and the beam each extends.

    The beams are numbered within the prompt: `[batch, 2 * num_beams]`. Twice as many as beams: each
    beam can end in just one of them, so enough remain to go on with.
    """
    batch, width = running.scores.shape
    step = int(running.lengths[0, 0])
    log_probs = log_softmax(logits)
    vocab = log_probs.shape[-1]
    seen = np.concatenate(
        [
            np.repeat(prompts.vocabulary(), width, axis=0),
            running.tokens[:, :, :step].reshape(batch * width, step),
        ],
        axis=1,
    )
    gains = penalize_repetition(log_probs, seen, config.repetition_penalty)
    totals = gains.reshape(batch, width, vocab) + running.scores[:, :, None]
    flat = totals.reshape(batch, width * vocab)
    best = _top(flat, 2 * config.num_beams)
    parents, chosen = best // vocab, best % vocab
    extended = running.take(parents)
    extended.tokens[:, :, step] = chosen
    gained = np.take_along_axis(log_probs.reshape(batch, width * vocab), best, axis=1)
    return _Hypotheses(
        tokens=extended.tokens,
        lengths=extended.lengths + 1,
        log_probs=extended.log_probs + gained,
        scores=np.take_along_axis(flat, best, axis=1),
    ), parents


def _with_finished(
    finished: _Hypotheses,
    candidates: _Hypotheses,
    ended: NDArray[np.bool_],
    scale: float,
) -> _Hypotheses:
    """The best of the hypotheses finished so far and the candidates that `ended`.

    `finished` is `[batch, num_beams]`, `candidates` and `ended` are `[batch, 2 * num_beams]`. Only
    the first `num_beams` candidates count: the others would not have become beams. Their scores are
    divided by `scale`.
    """
    beams = finished.scores.shape[1]
    counts = ended & (np.arange(ended.shape[1]) < beams)
    both = finished.merged(
        candidates.rescored(np.where(counts, candidates.scores / scale, np.float32(-np.inf)))
    )
    return both.take(_top(both.scores, beams))


def _top(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the `count` highest scores of each row, highest first, `[batch, count]`."""
    some = np.sort(np.argpartition(-scores, count - 1, axis=-1)[:, :count], axis=-1)
    order = np.argsort(-np.take_along_axis(scores, some, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(some, order, axis=-1)


def _cache_rows(parents: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Beam numbers within each prompt, `[batch, beams]`, to cache rows, `[batch * beams]`.

    Each prompt has `width` cache rows.
    """
    return (parents + width * np.arange(len(parents))[:, None]).reshape(-1)


def _ranked(finished: _Hypotheses) -> list[list[Generated]]:
    batch, beams = finished.scores.shape
    return [
        [
            Generated(
                tokens=tuple(finished.tokens[row, beam, : finished.lengths[row, beam]].tolist()),
                cumulative_log_prob=float(finished.log_probs[row, beam]),
                score=float(finished.scores[row, beam]),
            )
            for beam in range(beams)
        ]
        for row in range(batch)
    ]
