"""Settings of a generation, and its result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

from mpt_trt.errors import MptTrtError

TopLogProbs = tuple[tuple[int, float], ...]
"""Most likely tokens with their natural log-probabilities, most likely first."""


# Limits of `repetition_penalty`. Beyond them it decides every choice, and can make logits infinite.
LEAST_PENALTY, MOST_PENALTY = 0.01, 100


@dataclass(frozen=True)
class GenerationConfig:
    """Settings for choosing tokens.

    `top_k=1` is greedy (or, with `num_beams` > 1, beam search), for any `temperature` and `top_p`.
    Any other `top_k` samples: repetition penalty, temperature, top-k and top-p, in that order.

    Raises:
        MptTrtError: a field is outside its range; names the field, the value and the range.
    """

    max_new_tokens: int
    end_ids: tuple[int, ...]
    """Tokens that end a sequence; (): every sequence gets `max_new_tokens` tokens."""
    pad_id: int
    """Token that the model reads in place of padding. It never pads the output."""
    num_beams: int = 1
    temperature: float = 1.0
    top_k: int = 1
    """Sample among the k most likely tokens; 0: no limit."""
    top_p: float = 0.0
    """Sample among the fewest tokens whose probabilities add up to top_p; 0 or 1: off."""
    repetition_penalty: float = 1.0
    """> 1 makes tokens of the prompt and of the output so far less likely (arXiv:1909.05858)."""
    length_penalty: float = 1.0
    """Hypotheses are ranked by log-probability / (number of new tokens ** length_penalty)."""
    random_seed: int = 0
    top_log_probs: int = 0
    """Most likely tokens to report for each new token, with their log-probabilities."""

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", _is_count(self.max_new_tokens, 1), "an integer of at least 1"),
            ("end_ids", all(_is_count(token, 0) for token in self.end_ids), "token ids >= 0"),
            ("pad_id", _is_count(self.pad_id, 0), "a token id >= 0"),
            ("num_beams", _is_count(self.num_beams, 1), "an integer of at least 1"),
            ("temperature", 0 < self.temperature < math.inf, "a finite number above 0"),
            ("top_k", _is_count(self.top_k, 0), "an integer of at least 0 (0: no limit)"),
            ("top_p", 0 <= self.top_p <= 1, "a number from 0 to 1 (0 and 1: off)"),
            (
                "repetition_penalty",
                LEAST_PENALTY <= self.repetition_penalty <= MOST_PENALTY,
                f"a number from {LEAST_PENALTY} to {MOST_PENALTY}",
            ),
            ("length_penalty", math.isfinite(self.length_penalty), "a finite number"),
            ("random_seed", _is_count(self.random_seed, 0), "an integer of at least 0"),
            ("top_log_probs", _is_count(self.top_log_probs, 0), "an integer of at least 0"),
        )
        for field, legal, legal_range in rules:
            if not legal:
                raise MptTrtError(f"{field} is {getattr(self, field)!r}; it must be {legal_range}")
        if self.num_beams > 1 and self.top_k != 1:
            raise MptTrtError(
                f"top_k is {self.top_k} with num_beams {self.num_beams}; it must be 1, because beam"
                " search does not sample (or set num_beams to 1)"
            )
        if self.num_beams > 1 and self.top_log_probs:
            raise MptTrtError(
                f"top_log_probs is {self.top_log_probs} with num_beams {self.num_beams}; it must be"
                " 0, because beam search does not report them (or set num_beams to 1)"
            )

    @property
    def is_greedy(self) -> bool:
        """Returns whether every token is the model's most likely one."""
        return self.top_k == 1 and self.num_beams == 1 and self.repetition_penalty == 1

    @property
    def num_candidates(self) -> int:
        """Number of extensions per prompt that a step of beam search considers.

        Each beam can end in one extension per end token, so enough of them continue.
        """
        return max(2, 1 + len(set(self.end_ids))) * self.num_beams


@dataclass(frozen=True)
class Generated:
    """A continuation of a prompt."""

    tokens: tuple[int, ...]
    """New tokens, without prompt and padding, but with the end token if it was produced."""
    cumulative_log_prob: float
    """Natural log of the model's probability of these tokens, before any penalty, temperature or
    filter."""
    log_probs: tuple[float, ...] = ()
    """Natural log-probability of each new token, likewise."""
    top_log_probs: tuple[TopLogProbs, ...] = ()
    """The most likely tokens at each new token's position; () unless they were requested."""
    score: float | None = None
    """Ranking score among a prompt's beams: log-probability with the repetition penalty, divided by
    length ** length_penalty. None without beams."""


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least
