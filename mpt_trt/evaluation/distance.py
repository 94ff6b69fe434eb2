"""Distance of an engine's logits from the float32 reference, and its tolerance.

Does not import NumPy, because Snakemake's planning reads tolerances.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """The largest distance that a smoke test accepts; the fields are bounds of `Distance`'s."""

    max_abs: float
    mean_kl: float
    min_top1: float


@dataclass(frozen=True)
class Distance:
    """Distance of logits from the reference.

    max_abs: largest difference of a logit. mean_kl: mean over positions of KL(reference || engine),
    in nats. top1: share of positions with the same most likely token. positions: number of compared
    positions.
    """

    max_abs: float
    mean_kl: float
    top1: float
    positions: int

    def violations(self, tolerance: Tolerance) -> list[str]:
        """Describes each figure that exceeds the tolerance; [] if none does."""
        checks = (
            (self.max_abs <= tolerance.max_abs, f"max_abs {self.max_abs:.3g}", tolerance.max_abs),
            (self.mean_kl <= tolerance.mean_kl, f"mean_kl {self.mean_kl:.3g}", tolerance.mean_kl),
            (self.top1 >= tolerance.min_top1, f"top1 {self.top1:.3g}", tolerance.min_top1),
        )
        return [f"{figure} (allowed {bound:g})" for is_fine, figure, bound in checks if not is_fine]
