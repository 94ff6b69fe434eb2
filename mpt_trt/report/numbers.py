"""Formats numbers for readers: few digits, standard errors, powers of ten."""

from __future__ import annotations

import math

from mpt_trt.evaluation.quality_result import Estimate

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
# Exponents of ten that are written as decimals.
PLAIN = range(-3, 6)


def number(value: float, digits: int = 3) -> str:
    """Formats `value` with `digits` significant digits: `13.1`, `4,550`, `5.01 x 10⁻⁷`."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if int(exponent) in PLAIN:
        decimals = max(0, digits - 1 - int(exponent))
        rounded = float(f"{mantissa}e{exponent}")
        return f"{rounded:,.{decimals}f}".replace("-", MINUS)
    return f"{mantissa.replace('-', MINUS)} {_power(int(exponent))}"


def with_error(estimate: Estimate, scale: float = 1, show_sign: bool = False) -> str:
    """Formats `mean ± standard error`, both times `scale`, the error with two significant digits.

    If there is no error, or it is zero, the result is the mean with three digits.
    """
    mean = estimate.mean * scale
    if not estimate.standard_error:
        sign = "+" if show_sign and mean > 0 else ""
        return sign + number(mean)
    error = estimate.standard_error * scale
    exponent = math.floor(math.log10(max(abs(mean), error)))
    shift = 0 if exponent in PLAIN else exponent
    mean, error = mean / 10**shift, error / 10**shift
    decimals = max(0, 1 - int(f"{error:.1e}".split("e")[1]))
    sign = "+" if show_sign else ""
    text = f"{mean:{sign},.{decimals}f} ± {error:,.{decimals}f}".replace("-", MINUS)
    return f"({text}) {_power(shift)}" if shift else text


def _power(exponent: int) -> str:
    return f"{TIMES} 10{str(exponent).translate(SUPERSCRIPTS)}"
