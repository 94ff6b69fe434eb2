"""Choice of a format for each matrix within a budget of bits per weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import BlockMatrix
from mpt_trt.quantization.schemes import IntegerFormat, mixed_candidates

Place = TypeVar("Place")


@dataclass(frozen=True)
class Candidate:
    """A format of a matrix. size: bits. divergence: that of the model with only this change."""

    format: IntegerFormat
    size: float
    divergence: float


def matrix_bits(each: IntegerFormat, out_features: int, in_features: int) -> float:
    """Bits of a matrix in a format, scales included."""
    return each.bits_per_weight(in_features) * out_features * in_features


def require_budget(config: MptConfig, bits: float) -> None:
    """Raises MptTrtError when not even a model's smallest formats fit into the budget.

    bits: average bits per weight, scales included.
    """
    shapes, formats = [matrix.shape(config) for matrix in BlockMatrix], mixed_candidates(config)
    smallest = [min(formats, key=lambda each: matrix_bits(each, *shape)) for shape in shapes]
    sizes = [matrix_bits(each, *shape) for each, shape in zip(smallest, shapes, strict=True)]
    least = sum(sizes) / sum(map(math.prod, shapes))
    if bits < least:
        raise _too_small(bits, least, smallest)


def _too_small(bits: float, least: float, smallest: Iterable[IntegerFormat]) -> MptTrtError:
    names = ", ".join(sorted({each.name for each in smallest}))
    return MptTrtError(
        f"bits = {bits:g}: this model's smallest formats ({names}) take {least:g} bits per weight "
        f"with their scales; set bits to {math.ceil(least * 1000) / 1000:g} or more"
    )


def choose_formats(
    candidates: Mapping[Place, Sequence[Candidate]], num_weights: int, bits: float
) -> dict[Place, IntegerFormat]:
    """Chooses one candidate of each matrix, so that the sum of divergences is small.

    All matrices start with their smallest format. Then the step that lowers the divergence most for
    its bits is taken, as long as one fits. bits: average bits per weight, scales included.

    Raises MptTrtError, with the smallest possible budget, when not even that fits.
    """
    chosen = {place: min(each, key=lambda c: c.size) for place, each in candidates.items()}
    left = bits * num_weights - sum(each.size for each in chosen.values())
    if left < 0:
        least = sum(each.size for each in chosen.values()) / num_weights
        raise _too_small(bits, least, (each.format for each in chosen.values()))
    while steps := [
        ((now.divergence - new.divergence) / (new.size - now.size), place, new)
        for place, now in chosen.items()
        for new in candidates[place]
        if 0 < new.size - now.size <= left and new.divergence < now.divergence
    ]:
        _, place, new = max(steps, key=lambda step: step[0])
        left -= new.size - chosen[place].size
        chosen[place] = new
    return {place: each.format for place, each in chosen.items()}
