"""Speed of an engine in result files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Speed of one sequence in tokens per second, for reading a prompt and for continuing it.

    Medians over `rounds` measurements, and in ..._range the slowest and the fastest one.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prefill_range: tuple[float, ...]
    decode_range: tuple[float, ...]
    rounds: int

    @classmethod
    def of_rounds(cls, prefill: Sequence[float], decode: Sequence[float]) -> Speed:
        """Summarizes the speeds of several rounds."""
        return cls(
            prefill_tokens_per_s=statistics.median(prefill),
            decode_tokens_per_s=statistics.median(decode),
            prefill_range=(min(prefill), max(prefill)),
            decode_range=(min(decode), max(decode)),
            rounds=len(prefill),
        )


def speed_in_words(speed: Speed) -> str:
    """Median speeds, with the range of the rounds."""
    decode = _in_words(speed.decode_tokens_per_s, speed.decode_range)
    prefill = _in_words(speed.prefill_tokens_per_s, speed.prefill_range)
    rounds = "1 round" if speed.rounds == 1 else f"median and range of {speed.rounds} rounds"
    return f"{decode} tokens/s (prompt: {prefill} tokens/s), {rounds}"


def _in_words(median: float, bounds: Sequence[float]) -> str:
    low, high = min(bounds), max(bounds)
    return _rate(median) if low == high else f"{_rate(median)} [{_rate(low)} to {_rate(high)}]"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
