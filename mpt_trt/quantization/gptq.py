"""Rounds weights with GPTQ (Frantar et al., arXiv:2210.17323), which corrects its own errors.

The weights of a linear layer are rounded one input feature after the other. After each, later
features are changed to compensate for the error of the layer's output on the calibration text,
whose Hessian is H = sum of x x^T over the inputs x.

If earlier layers have been rounded as well, the inputs x differ from the inputs y of the
unquantized model. The weights W are first moved towards those that map x to the output W y with the
least error, W + W (sum of (y - x) x^T) H^-1 (Li et al., arXiv:2504.02692, have the same aim).

Features are rounded in the order of their mean square, the largest first, so that many features are
left to correct the most important errors. Groups follow the stored order: their scales are chosen
first, and no permutation is stored.

Finally each feature is rounded anew, with all others as they are, several times in the same order:
early features were rounded without knowledge of later errors (coordinate descent, as in Behdin et
al., arXiv:2309.01885).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpt_trt.quantization.grids import Grid
from mpt_trt.quantization.scale_search import search_scales

DAMPING = 0.01
"""Part of the Hessian's mean diagonal that is added to its diagonal, as in the paper."""
BLOCK_COLUMNS = 128
"""Input features whose errors are applied to all others together."""
SWEEPS = 2
"""Times that all features are rounded anew."""

CORRECTION = 0.5
"""Fraction of the move towards the weights of least error. The full move would follow the
calibration text too closely."""


@dataclass(frozen=True)
class Statistics:
    """Sums over the tokens of the calibration text.

    hessian: sum of x x^T, float64 `[in, in]`. shift: sum of (y - x) x^T, float32 `[in, in]`. x are
    the layer's inputs in the model as rounded so far, y those in the unquantized model.
    """

    hessian: Tensor
    shift: Tensor

    @classmethod
    def empty(cls, in_features: int, device: torch.device) -> Statistics:
        """Makes sums over no tokens."""
        hessian = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        return cls(hessian, torch.zeros(in_features, in_features, device=device))

    def add(self, inputs: Tensor, expected: Tensor) -> None:
        """Adds tokens x and y, `[tokens, in]` each."""
        inputs, expected = inputs.float(), expected.float()
        self.hessian.add_(inputs.T @ inputs)
        self.shift.addmm_((expected - inputs).T, inputs)

    @property
    def is_finite(self) -> bool:
        """Returns whether neither the inputs nor the sums contained NaN or Inf."""
        return bool(self.hessian.isfinite().all() and self.shift.isfinite().all())


@dataclass(frozen=True)
class RoundedMatrix:
    """A matrix on a grid.

    values: float32 numbers of the grid, `[out, in]`. scales: float32 `[out, in / group_size]`.
    """

    values: Tensor
    scales: Tensor

    def dequantized(self) -> Tensor:
        """Computes the represented weights, float32 `[out, in]`."""
        return self.values * _by_feature(self.scales, self.values.shape[1])


def round_with_gptq(
    weight: Tensor, statistics: Statistics, grid: Grid, group_size: int
) -> RoundedMatrix:
    """Rounds a matrix to a grid.

    weight: float32 `[out, in]`. statistics: overwritten, to save memory. group_size: input features
    that share a scale; it divides `in`.
    """
    hessian, shift = statistics.hessian, weight @ statistics.shift
    diagonal = hessian.diagonal()
    # Features that are zero in the whole text have no error to correct.
    diagonal[diagonal == 0] = 1
    importance = diagonal.float()
    diagonal += DAMPING * diagonal.mean()
    order = importance.argsort(descending=True, stable=True)
    hessian.copy_(hessian[order[:, None], order])
    ordered_hessian = statistics.shift.copy_(hessian)
    factor = inverse_factor(hessian)
    weight = weight.clone()
    weight[:, order] += CORRECTION * (shift[:, order] @ factor.T @ factor)
    groups = weight.reshape(len(weight), -1, group_size)
    scales = search_scales(groups, importance.reshape(-1, group_size), grid)
    scale_of_feature = _by_feature(scales, weight.shape[1])
    # Columns are rows here, which are contiguous in memory.
    columns, their_scales = weight.T[order], scale_of_feature.T[order]
    rounded = _round_in_order(columns.clone(), their_scales, factor, grid)
    _round_anew(rounded, columns, their_scales, ordered_hessian, grid)
    values = torch.empty_like(weight)
    values[:, order] = rounded.T
    return RoundedMatrix(values, scales)


def _by_feature(scales: Tensor, in_features: int) -> Tensor:
    return scales.repeat_interleave(in_features // scales.shape[1], 1)


def _round_in_order(rest: Tensor, scales: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Rounds input features one after the other, and returns their numbers on the grid.

    rest: weights, float32 `[in, out]`, which are overwritten. scales: float32 `[in, out]`. factor:
    see `inverse_factor`.
    """
    values = torch.empty_like(rest)
    for start in range(0, len(rest), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(rest))
        errors = torch.empty_like(rest[start:stop])
        for column in range(start, stop):
            values[column] = grid.quantized(rest[column] / scales[column])
            corrections = factor[column, column:stop]
            error = (rest[column] - values[column] * scales[column]) / corrections[0]
            rest[column:stop].addr_(corrections, error, alpha=-1)
            errors[column - start] = error
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return values


def _round_anew(
    values: Tensor, weight: Tensor, scales: Tensor, hessian: Tensor, grid: Grid
) -> None:
    """Moves each number to where the error is least while all others stay, SWEEPS times, in place.

    values, weight, scales: float32 `[in, out]`. hessian: float32 `[in, in]`.
    """
    # Half of the negative gradient of the error, by weight.
    descent = hessian @ (weight - values * scales)
    for start in list(range(0, len(values), BLOCK_COLUMNS)) * SWEEPS:
        stop = min(start + BLOCK_COLUMNS, len(values))
        changes = torch.empty_like(values[start:stop])
        for feature in range(start, stop):
            row = hessian[feature]
            steps = descent[feature] / (row[feature] * scales[feature])
            moved = grid.quantized(values[feature] + steps)
            change = (moved - values[feature]) * scales[feature]
            values[feature] = moved
            descent[start:stop].addr_(row[start:stop], change, alpha=-1)
            changes[feature - start] = change
        for others in (slice(0, start), slice(stop, None)):
            descent[others].addmm_(hessian[others, start:stop], changes, alpha=-1)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Computes the upper triangular U with H^-1 = U^T U, float32; overwrites H, float64 `[n, n]`.

    With rows and columns reversed, the Cholesky factor L of H is lower triangular, and U is its
    inverse, reversed back: one factorization, and no inverse of H.
    """
    hessian.copy_(hessian.flip(0, 1))
    torch.linalg.cholesky(hessian, out=hessian)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    # In place, which a model of 7B needs: one matrix of its widest layer takes 2.1 GB.
    torch.linalg.solve_triangular(hessian, identity, upper=False, out=identity)
    return identity.float().flip(0, 1)
