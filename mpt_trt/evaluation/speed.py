"""The speed of an engine, as results record it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Speed of one sequence in tokens per second: prefill reads its prompt, decode continues it."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
