"""Rotary position embedding: the rotation of queries and keys by their positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mpt_trt.errors import MptTrtError

RopeScaling = Literal["none", "linear", "dynamic", "llama3"]
# Several times the largest models' values.
MOST_THETA = 1e12


@dataclass(frozen=True)
class Rope:
    """Settings of rotary position embedding, with the names of Llama's configurations.

    theta: base of the frequencies. scaling: "linear" divides positions by `factor`. "dynamic"
    changes nothing within max_seq_len positions, and is not computed beyond them. "llama3" divides
    low frequencies by
        `factor`; the last three settings belong to it.

    Raises MptTrtError when a number is not positive or the frequencies are not in order.
    """

    theta: float = 10_000.0
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "scaling" and not 0 < value < math.inf:
                raise MptTrtError(f"rope.{name} = {value}: a positive number is required")
        if not 1 < self.theta <= MOST_THETA:
            raise MptTrtError(f"rope.theta = {self.theta}: 1 to {MOST_THETA:g} are supported")
        if self.low_freq_factor >= self.high_freq_factor:
            raise MptTrtError(
                f"rope.low_freq_factor = {self.low_freq_factor}: it must be less than "
                f"high_freq_factor ({self.high_freq_factor})"
            )


def rope_frequencies(rope: Rope, head_dim: int) -> list[float]:
    """Computes the angle, in radians per position, of each pair of features, `[head_dim / 2]`.

    Features i and i + head_dim / 2 of a head are a pair (GPT-NeoX's order, which both
    implementations of llm-foundry have). Formula: Su et al. 2021 (arXiv:2104.09864), section 3.2.2.
    """
    frequencies = [rope.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    match rope.scaling:
        case "linear":
            return [frequency / rope.factor for frequency in frequencies]
        case "llama3":
            return [_llama3_frequency(rope, frequency) for frequency in frequencies]
        case _:
            return frequencies


def _llama3_frequency(rope: Rope, frequency: float) -> float:
    """Divides waves that are long in the original context by `factor`, with a linear transition.

    Source: transformers' `_compute_llama3_parameters`.
    """
    waves = rope.original_max_position_embeddings * frequency / (2 * math.pi)
    share = (waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = min(max(share, 0.0), 1.0)
    return frequency * (share + (1 - share) / rope.factor)
