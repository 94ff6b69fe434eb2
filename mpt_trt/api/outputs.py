"""Results of a generation: completions, and parts of them as they are generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpt_trt.generation.config import Generated, TopLogProbs
from mpt_trt.generation.text import Decoder, GeneratedText

FinishReason = Literal["stop", "length"]
"""`stop`: an end token or a stop string; `length`: `max_new_tokens` tokens."""


@dataclass(frozen=True)
class Completion:
    """A continuation of a prompt."""

    text: str
    """Text without special tokens, and without the stop string that ended it."""
    tokens: tuple[int, ...]
    """All new tokens, including an end token and those of a stop string."""
    finish_reason: FinishReason
    log_probs: tuple[float, ...]
    """Natural log-probability of each token, before any penalty, temperature or filter."""
    top_log_probs: tuple[TopLogProbs, ...] = ()
    """For each token, the requested number of most likely tokens with their log-probabilities."""
    score: float | None = None
    """Ranking score among beams; None without beams."""

    @property
    def cumulative_log_prob(self) -> float:
        """Natural log-probability of all tokens together."""
        return sum(self.log_probs)


@dataclass(frozen=True)
class Output:
    """A prompt with its completions: one, or one per beam, best first."""

    prompt_tokens: tuple[int, ...]
    completions: tuple[Completion, ...]

    @property
    def text(self) -> str:
        """Text of the best completion."""
        return self.completions[0].text

    @property
    def tokens(self) -> tuple[int, ...]:
        """New tokens of the best completion."""
        return self.completions[0].tokens


@dataclass(frozen=True)
class StreamPart:
    """A new token of one of several prompts.

    index: the prompt. text: new text that is certain now, often "". finish_reason: None unless this
    is the prompt's last token.
    """

    index: int
    text: str
    token: int
    log_prob: float
    top_log_probs: TopLogProbs = ()
    finish_reason: FinishReason | None = None


def make_completion(
    generated: Generated, decoder: Decoder, end_ids: tuple[int, ...], stop: tuple[str, ...]
) -> Completion:
    """Makes a completion of generated tokens. end_ids, stop: end tokens and stop strings."""
    text = GeneratedText(decoder, stop)
    is_ended = False
    for token in generated.tokens:
        is_ended = text.add(token) or token in end_ids
    return Completion(
        text=text.text(),
        tokens=generated.tokens,
        finish_reason="stop" if is_ended else "length",
        log_probs=generated.log_probs,
        top_log_probs=generated.top_log_probs,
        score=generated.score,
    )
