"""Speed of an engine in result files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Speed of one sequence in tokens per second, for reading a prompt and for continuing it."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
