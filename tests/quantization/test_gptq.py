"""GPTQ against a plain implementation of its paper, and the search for scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mpt_trt.quantization.gptq import (
    CORRECTION,
    DAMPING,
    SWEEPS,
    Statistics,
    inverse_factor,
    round_with_gptq,
)
from mpt_trt.quantization.grids import E4M3, INT4, INT8, Grid
from mpt_trt.quantization.scale_search import search_scales
from references.plain_gptq import least_error_weights, plain_descent, plain_gptq

# More input features than one block of columns.
OUT, IN, TOKENS = 24, 160, 400


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor]:
    """Correlated features of different sizes, and what they are without errors before them."""
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(IN, IN, generator=generator) / 4 + torch.eye(IN)
    sizes = torch.rand(IN, generator=generator) + 0.05
    expected = torch.randn(TOKENS, IN, generator=generator) @ mixing * sizes
    return expected + 0.1 * torch.randn(TOKENS, IN, generator=generator) * sizes, expected


def statistics(inputs: Tensor, expected: Tensor) -> Statistics:
    found = Statistics.empty(IN, torch.device("cpu"))
    for part in (slice(0, 100), slice(100, None)):
        found.add(inputs[part], expected[part])
    return found


@pytest.mark.parametrize(("grid", "group_size"), [(INT4, 32), (INT4, 160), (INT8, 80)])
def test_integers_are_those_of_the_paper(grid: Grid, group_size: int, weight, inputs) -> None:
    x, y = (part.double().numpy() for part in inputs)
    rounded = round_with_gptq(weight, statistics(*inputs), grid, group_size)
    hessian = x.T @ x
    damping = DAMPING * hessian.diagonal().mean()
    whole_way = least_error_weights(weight.double().numpy(), x, y, damping)
    target = weight.double().numpy() * (1 - CORRECTION) + CORRECTION * whole_way
    scales = rounded.scales.double().numpy().repeat(group_size, 1)
    order = np.argsort(-hessian.diagonal()).tolist()
    damped = hessian + damping * np.eye(IN)
    limits = int(grid.lowest), int(grid.highest)
    expected = plain_gptq(target, damped, scales, order, *limits)
    for _ in range(SWEEPS):
        expected = plain_descent(expected, target, damped, scales, order, *limits)
    # float32 may round a few the other way; each moves others of its row.
    assert (rounded.values.numpy() == expected).mean() > 0.98
    assert _error(rounded.dequantized(), weight, inputs) < 1.01 * _error(
        torch.from_numpy(expected * scales), weight, inputs
    )


def test_errors_are_smaller_than_those_of_rounding_to_nearest(weight, inputs) -> None:
    rounded = round_with_gptq(weight, statistics(*inputs), INT4, 32)
    groups = weight.reshape(OUT, -1, 32)
    scales = groups.abs().amax(-1, keepdim=True) / 7
    nearest = (INT4.quantized(groups / scales) * scales).reshape(OUT, IN)
    assert _error(rounded.dequantized(), weight, inputs) < 0.6 * _error(nearest, weight, inputs)


def _error(rounded: Tensor, weight: Tensor, inputs: tuple[Tensor, Tensor]) -> float:
    """Error of the layer's output, against that of the unquantized model."""
    x, y = (part.double() for part in inputs)
    return float((x @ rounded.double().T - y @ weight.double().T).square().sum())


def test_features_that_are_always_zero_keep_their_rounded_weights(weight) -> None:
    x = torch.randn(TOKENS, IN, generator=torch.Generator().manual_seed(3))
    x[:, 7] = 0
    rounded = round_with_gptq(weight, statistics(x, x), INT4, 32)
    dequantized = rounded.dequantized()
    assert dequantized.isfinite().all()
    assert (dequantized[:, 7] - weight[:, 7]).abs().max() <= rounded.scales[:, 0].abs().max()


def test_inverse_factor() -> None:
    root = torch.randn(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    hessian = root @ root.T + torch.eye(9)
    factor = inverse_factor(hessian.clone())
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close((factor.T @ factor).double(), torch.linalg.inv(hessian))


@pytest.mark.parametrize("grid", [INT4, INT8, E4M3], ids=["int4", "int8", "e4m3"])
def test_scales_are_no_worse_than_those_that_cover_all_weights(grid: Grid, weight) -> None:
    importance = torch.rand(IN, generator=torch.Generator().manual_seed(5))
    found = search_scales(weight, importance, grid)
    covering = weight.abs().amax(-1) / grid.highest

    def error(scales: Tensor) -> Tensor:
        rounded = grid.quantized(weight / scales[:, None]) * scales[:, None]
        return ((rounded - weight).square() * importance).sum(-1)

    assert (error(found) <= error(covering)).all()
    assert error(found).sum() < error(covering).sum()


def test_a_negative_scale_lets_minus_8_stand_for_the_largest_weight() -> None:
    weight = torch.tensor([[8.0, -7, 3, 1], [-8, 7, 3, 1], [0, 0, 0, 0]])
    assert search_scales(weight, torch.ones(4), INT4).tolist() == [-1, 1, 1]


def test_scales_of_int8_are_positive(weight) -> None:
    """TensorRT rejects negative scales, except for 4-bit integers."""
    assert (search_scales(weight, torch.ones(IN), INT8) > 0).all()


def test_grids() -> None:
    values = torch.tensor([-1000.0, -8.4, -0.5, 0.5, 1.5, 6.6, 1000])
    assert INT4.quantized(values).tolist() == [-8, -8, 0, 0, 2, 7, 7]
    assert INT8.quantized(values).tolist() == [-127, -8, 0, 0, 2, 7, 127]
    assert E4M3.quantized(values).tolist() == [-448, -8, -0.5, 0.5, 1.5, 6.5, 448]
