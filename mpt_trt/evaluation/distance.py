"""Distance of an engine's logits from the float32 reference, and its tolerance.

Does not import NumPy, because Snakemake's planning reads tolerances.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpt_trt.quantization.schemes import Awq, Gptq, Mixed, Quantization, SmoothQuant, WeightOnly

ROUNDING_FACTOR = 4.0
"""Allowed multiple of the dtype's simulated error: kernels add in other orders and types."""
UNEXPLAINED_SHARE = 0.25
"""Allowed share of the quantization's error that differs from an exact simulation.

Measured on random and trained models: at most 0.07 for correct engines, and 0.5 or more if two
layers' scales are swapped, although the whole error may then grow by only a tenth.
"""


@dataclass(frozen=True)
class Tolerance:
    """Tolerance of a smoke test.

    error_factor: factor on the allowed error for the engine's dtype and quantization. min_top1:
    bound of `Distance.top1`.
    """

    error_factor: float
    min_top1: float


@dataclass(frozen=True)
class Distance:
    """Distance of logits from the reference.

    Errors are root mean squares over positions and tokens, in units of the spread of the
    reference's logits (their standard deviation at a position). error: the engine's error.
    expected_error: error of a simulation of its dtype and quantization. rounding_error: error of
    its dtype only. unexplained_error: distance of the engine from the simulation.

    max_abs: largest difference of a logit. mean_kl: mean over positions of KL(reference || engine),
    in nats. top1: share of positions with the same most likely token; tokens whose reference logits
    differ by less than the expected error count as the same. positions: number of compared
    positions.
    """

    error: float
    expected_error: float
    rounding_error: float
    unexplained_error: float
    max_abs: float
    mean_kl: float
    top1: float
    positions: int


@dataclass(frozen=True)
class Violation:
    """A figure beyond its bound. key: key of the tolerance that relaxes it."""

    text: str
    key: str


def allowed_error(distance: Distance, quantization: Quantization, tolerance: Tolerance) -> float:
    """Largest accepted `error`."""
    expected = _margin(quantization) * distance.expected_error
    return tolerance.error_factor * (expected + ROUNDING_FACTOR * distance.rounding_error)


def violations(
    distance: Distance, quantization: Quantization, tolerance: Tolerance
) -> list[Violation]:
    """Lists the figures that exceed their bounds."""
    found = []
    allowed = allowed_error(distance, quantization, tolerance)
    if not distance.error <= allowed:
        found.append(
            Violation(
                f"its error is {distance.error:.3g} of the logits' spread (expected "
                f"{distance.expected_error:.3g}, allowed {allowed:.3g})",
                "error_factor",
            )
        )
    elif _is_exact(quantization):
        share = UNEXPLAINED_SHARE * distance.expected_error
        allowed = tolerance.error_factor * (share + ROUNDING_FACTOR * distance.rounding_error)
        if not distance.unexplained_error <= allowed:
            found.append(
                Violation(
                    f"its quantization explains all but {distance.unexplained_error:.3g} of the "
                    f"logits' spread (allowed {allowed:.3g})",
                    "error_factor",
                )
            )
    if not distance.top1 >= tolerance.min_top1:
        found.append(
            Violation(
                f"its most likely token is the reference's at {distance.top1:.1%} of the positions "
                f"(allowed {tolerance.min_top1:.1%})",
                "min_top1",
            )
        )
    return found


def _is_exact(quantization: Quantization) -> bool:
    """Returns whether the simulation rounds to the same numbers as a correct engine."""
    rounds_weights_only = quantization.scheme is None or isinstance(quantization.scheme, WeightOnly)
    return rounds_weights_only and quantization.kv_cache == "auto"


def _margin(quantization: Quantization) -> float:
    """Allowed ratio of the error to the simulation's, which is an estimate if not exact.

    Measured on random and trained models, of correct engines: 1.0 (integer weights), 0.95 (AWQ),
    0.9 to 1.2 (fp8, caches of 8 bits), 1.4 (SmoothQuant per token) and, with scales from little
    calibration text, 3.1 (SmoothQuant with static scales).
    """
    scheme = quantization.scheme
    if isinstance(scheme, SmoothQuant):
        return 2.0 if scheme.per_token else 5.0
    rounds_weights_only = scheme is None or isinstance(scheme, WeightOnly | Awq | Gptq | Mixed)
    return 1.2 if rounds_weights_only and quantization.kv_cache == "auto" else 1.5
