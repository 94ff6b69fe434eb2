"""Searches scales with the least error, for all grids.

A group of weights with one scale is rounded with several candidates, and the scale with the least
squared error is kept. Errors are weighted: the importance of a weight is the mean square of the
input feature that it multiplies (the diagonal of the Hessian of the layer's squared error).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpt_trt.quantization.grids import Grid

FACTORS = 19
"""Candidate scales between SMALLEST_FACTOR and 1 times the scale that covers the whole group.

A smaller scale saturates the largest weights and rounds all others more finely.
"""
SMALLEST_FACTOR = 0.55


def search_scales(weight: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    """Chooses the scale of each group by importance-weighted squared error.

    weight: float32 `[..., group]`. importance: not negative, of a shape that expands to
    that of the weights.

    Candidates cover the amax with the grid's shorter side or, if the grid is not symmetric, the
    signed extreme with its longer side; that scale is negative if the extreme is positive, so that
    -8 stands for it. Returns float32 `[rows]`; rows of zeros have the scale 1.
    """
    starts = _covering_scales(weight, grid)
    best_scale = starts[0].clone()
    best_error = torch.full_like(best_scale, torch.inf)
    for start in starts:
        for factor in torch.linspace(1, SMALLEST_FACTOR, FACTORS).tolist():
            scale = start * factor
            error = weighted_error(weight, scale, importance, grid)
            is_better = error < best_error
            best_error = torch.where(is_better, error, best_error)
            best_scale = torch.where(is_better, scale, best_scale)
    return best_scale


def _covering_scales(weight: Tensor, grid: Grid) -> list[Tensor]:
    """Computes the scales, float32 `[...]`, with which all weights are within the grid."""
    amax = weight.abs().amax(-1)
    starts = [_nonzero(amax / grid.highest)]
    if not grid.is_symmetric:
        extreme = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))[..., 0]
        starts.append(_nonzero(extreme / grid.lowest))
    return starts


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def weighted_error(weight: Tensor, scale: Tensor, importance: Tensor, grid: Grid) -> Tensor:
    """Computes the weighted squared error of rounding each group with its scale, `[...]`."""
    rounded = grid.quantized(weight / scale[..., None]) * scale[..., None]
    return ((rounded - weight).square() * importance).sum(-1)
