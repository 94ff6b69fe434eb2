"""Grids of numbers that represent weights, times a scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The numbers that a format can represent.

    bits: bits per number. lowest, highest: the largest negative and positive numbers. nearest:
    rounds float32 values within that range to the grid, half to even.
    """

    bits: int
    lowest: float
    highest: float
    nearest: Callable[[Tensor], Tensor]

    def quantized(self, values: Tensor) -> Tensor:
        """Rounds values to the nearest number of the grid; values beyond its ends saturate."""
        return self.nearest(values.clamp(self.lowest, self.highest))

    @property
    def is_symmetric(self) -> bool:
        """Returns whether the largest negative and positive numbers have equal magnitudes."""
        return self.lowest == -self.highest


def _nearest_e4m3(values: Tensor) -> Tensor:
    return values.to(torch.float8_e4m3fn).to(values.dtype)


INT4 = Grid(4, -8, 7, torch.round)
# Symmetric, because TensorRT refuses the negative scales that -128 would need.
INT8 = Grid(8, -127, 127, torch.round)
E4M3 = Grid(8, -448, 448, _nearest_e4m3)
