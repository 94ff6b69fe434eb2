"""GPTQ as its paper defines it, step by step in float64: slow, and without any of its speed-ups.

After each rounding, the inverse Hessian of the features that are left is found by inverting the
Hessian of these features anew (arXiv:2210.17323, equations 2 and 3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def least_error_weights(weight: Floats, x: Floats, y: Floats, damping: float) -> Floats:
    """The weights V that minimise |V x - W y|^2 + damping |V - W|^2; x and y are `[tokens, in]`."""
    hessian = x.T @ x + damping * np.eye(x.shape[1])
    return np.linalg.solve(hessian, (weight @ (y.T @ x + damping * np.eye(x.shape[1]))).T).T


def plain_gptq(
    weight: Floats, hessian: Floats, scales: Floats, order: list[int], lowest: int, highest: int
) -> NDArray[np.int64]:
    """Rounds a matrix `[out, in]`; hessian: damped; scales: of each weight, `[out, in]`."""
    rest, left = weight.copy(), list(order)
    integers = np.zeros(weight.shape, np.int64)
    while left:
        feature = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        scale = scales[:, feature]
        integers[:, feature] = np.clip(np.rint(rest[:, feature] / scale), lowest, highest)
        error = (rest[:, feature] - integers[:, feature] * scale) / inverse[0, 0]
        rest[:, left] -= np.outer(error, inverse[0])
        left.pop(0)
    return integers


def plain_descent(
    integers: NDArray[np.int64],
    weight: Floats,
    hessian: Floats,
    scales: Floats,
    order: list[int],
    lowest: int,
    highest: int,
) -> NDArray[np.int64]:
    """Gives each number the value with the least error, while all others stay as they are.

    Tries all values; arguments as in `plain_gptq`.
    """
    found = integers.copy()
    for feature in order:
        errors = found * scales - weight
        errors[:, feature] = 0
        others = errors @ hessian[feature]
        own = np.arange(lowest, highest + 1)[:, None] * scales[:, feature] - weight[:, feature]
        costs = own**2 * hessian[feature, feature] + 2 * own * others
        found[:, feature] = costs.argmin(0) + lowest
    return found
