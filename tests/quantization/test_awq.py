"""4-bit integers of AWQ's matrices against the formula."""

from __future__ import annotations

import numpy as np
import pytest

from mpt_trt.quantization import awq


@pytest.mark.parametrize("group_size", [6, 64, 128])
def test_quotients_beside_halves_are_rounded_as_such(group_size: int) -> None:
    """A division by way of the reciprocal would round many of these elsewhere."""
    random = np.random.default_rng(0)
    scales = (random.random((130, 5)) * 10.0 ** random.integers(-6, 2, (130, 5))).astype(np.float32)
    halves = random.integers(-20, 21, (130, 5, group_size)).astype(np.float32) / 2
    weight = halves * scales[..., None]
    away = random.choice(np.array([-np.inf, np.inf], np.float32), weight.shape)
    weight = np.where(random.random(weight.shape) < 0.5, weight, np.nextafter(weight, away))
    scales[3, 2] = 0
    divisors = np.where(scales == 0, np.float32(1), scales)[..., None]
    expected = np.clip(np.rint(weight / divisors), -8, 7).reshape(130, -1)
    by_reciprocal = np.clip(np.rint(weight * (1 / divisors)), -8, 7).reshape(130, -1)
    assert (by_reciprocal != expected).any()
    found = awq.quantized_rows(weight.reshape(130, -1), scales)
    np.testing.assert_array_equal(found, expected)
