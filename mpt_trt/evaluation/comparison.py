"""Compares an engine's logits with the float32 reference and with simulated rounding."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mpt_trt.evaluation.distance import Distance
from mpt_trt.evaluation.logits import mean_divergence
from mpt_trt.evaluation.simulated_rounding import ExpectedLogits

# Relative error of float32 sums in another order, the smallest bound for engines.
SMALLEST_ERROR = 1e-5
# Bound of the difference of two logits, as a multiple of their errors.
TIE_ERRORS = 3 * math.sqrt(2)


def measure_distance(engine: NDArray[np.float32], expected: ExpectedLogits) -> Distance:
    """Compares an engine's logits `[positions, vocab]` with the expected ones."""
    reference, in_dtype, quantized = (
        logits.numpy().astype(np.float64)
        for logits in (expected.reference, expected.in_dtype, expected.quantized)
    )
    wide, spread = engine.astype(np.float64), spread_of(reference)
    expected_error = max(_rms(quantized - reference) / spread, SMALLEST_ERROR)
    return Distance(
        error=_rms(wide - reference) / spread,
        expected_error=expected_error,
        rounding_error=max(_rms(in_dtype - reference) / spread, SMALLEST_ERROR),
        unexplained_error=_rms(wide - quantized) / spread,
        max_abs=float(np.abs(wide - reference).max()),
        mean_kl=mean_divergence(reference, wide),
        top1=top1_agreement(wide, reference, TIE_ERRORS * expected_error * spread),
        positions=len(engine),
    )


def spread_of(logits: NDArray[np.float64]) -> float:
    """Standard deviation of logits `[positions, vocab]` from their position's mean; never 0."""
    return max(_rms(logits - logits.mean(axis=-1, keepdims=True)), SMALLEST_ERROR)


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.square(values).mean()))


def top1_agreement(
    engine: NDArray[np.float64], reference: NDArray[np.float64], tie: float
) -> float:
    """Share of positions at which the engine's most likely token is the reference's.

    engine, reference: logits `[positions, vocab]`. tie: difference of logits up to which
    tokens count as equally likely.
    """
    chosen = np.take_along_axis(reference, engine.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    is_finite = np.isfinite(engine).all(axis=-1)
    return float((is_finite & (reference.max(axis=-1) - chosen <= tie)).mean())
