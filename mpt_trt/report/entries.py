"""Measurements that a report compares: an entry per engine, and other programs' points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.llama_cpp_result import Point, read_llama_cpp
from mpt_trt.evaluation.quality_result import Estimate, QualityResult, read_quality
from mpt_trt.evaluation.smoke_result import SmokeResult, read_smoke_result


@dataclass(frozen=True)
class Entry:
    """An engine of a report: the name of its variant, and the results of its measurements."""

    variant: str
    quality: QualityResult
    smoke: SmokeResult

    @property
    def label(self) -> str:
        """Name of the engine in the report."""
        ranks = self.quality.ranks
        return self.variant if ranks == 1 else f"{self.variant}, {ranks} ranks"

    @property
    def perplexity_change(self) -> Estimate:
        """Change relative to the reference; its error follows from the exponential's derivative."""
        excess = self.quality.figures.excess
        change, error = math.expm1(excess.mean), excess.standard_error
        return Estimate(change, None if error is None else error * (1 + change))


def read_entry(variant: str, quality: Path, smoke_test: Path) -> Entry:
    """Reads an engine's results; raises MptTrtError when a file is not a result."""
    return Entry(variant, read_quality(quality), read_smoke_result(smoke_test))


def read_points(path: Path, entries: list[Entry]) -> tuple[Point, ...]:
    """Reads llama.cpp's points; raises MptTrtError when they were measured on other text."""
    found = read_llama_cpp(path)
    quality = entries[0].quality
    windows = found.windows[0] * found.windows[1]
    if (found.text_hash, windows) != (quality.text_hash, quality.figures.tokens):
        raise MptTrtError(f"{path}: measured on other text than the engines; measure it again")
    return found.points


def require_comparable(entries: list[Entry]) -> None:
    """Raises MptTrtError when engines were measured on different text or windows."""
    if not entries:
        raise MptTrtError("a report needs at least one engine; see report in config.yaml")
    first = _text_measured(entries[0])
    for entry in entries:
        if _text_measured(entry) != first:
            raise MptTrtError(
                f"{entries[0].label} and {entry.label} were measured on different text; "
                "measure both again"
            )


def _text_measured(entry: Entry) -> tuple[str, int, int]:
    quality = entry.quality
    return quality.text_hash, quality.window_length, quality.figures.tokens
