"""Prints results of measurements, one line per figure."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

from mpt_trt.evaluation.quality_result import QualityResult
from mpt_trt.evaluation.smoke_result import SmokeResult, require_passed, write_smoke_result
from mpt_trt.evaluation.speed import speed_in_words
from mpt_trt.proofs.result import ProofResult, Verdict

# Width of lines in a log.
LOG_WIDTH = 100


def show_smoke_result(result: SmokeResult, path: Path) -> None:
    """Print generated text, speed, runtime, and distance from the reference."""
    distance = result.distance
    builder = result.builder
    engines = ", ".join(str(Path(result.engine_dir) / name) for name in result.engines)
    _show(
        {
            "Prompt": result.prompt,
            "Text": result.text,
            "Speed": speed_in_words(result.speed),
            "Runtime": _runtime(result.runtime, result.fallback_reason),
            "Distance": f"error {distance.error:.2g} of the logits' spread (expected "
            f"{distance.expected_error:.2g}, allowed {result.allowed_error:.2g}), mean KL "
            f"{distance.mean_kl:.2g} nats, same top token {distance.top1:.1%}, over "
            f"{distance.positions} positions",
            "Reference": result.reference,
            "Engine": f"{engines} ({builder.package} {builder.version} for GPUs of compute "
            f"capability {', '.join(builder.compute_capabilities)})",
            "Smoke test": "passed" if result.passed else "FAILED",
            "Result": str(path),
        }
    )


def finish_smoke_test(
    result: SmokeResult, options: argparse.Namespace, inputs: Iterable[Path]
) -> None:
    """Write a result to --output; print it and judge it, unless --report_only is set.

    Raises MptTrtError when the engine is too far from the reference.
    """
    write_smoke_result(result, options.output, inputs)
    if not options.report_only:
        show_smoke_result(result, options.output)
        require_passed(result, options.output, "--")


def show_quality(result: QualityResult, path: Path) -> None:
    """Print an engine's quality on held-out text, its size and its speed."""
    figures = result.figures
    _show(
        {
            "Perplexity": f"{figures.perplexity:.4f} (reference {figures.reference_perplexity:.4f},"
            f" {figures.excess.mean:+.2g} nats per token)",
            "Distance": f"mean KL {figures.kl.mean:.2g} nats, same top token "
            f"{figures.top1.mean:.2%}, over {figures.tokens} tokens",
            **_whole_text_rows(result),
            **_task_rows(result.tasks),
            "Size": f"weights {result.size.networks / 1e6:.1f} MB, plans "
            f"{result.size.plans / 1e6:.1f} MB",
            "Speed": speed_in_words(result.speed),
            f"{result.throughput_rows} at a time": speed_in_words(result.throughput),
            "Runtime": _runtime(result.runtime, result.fallback_reason),
            "Result": str(path),
        }
    )


def show_proof(result: ProofResult) -> None:
    """Print every fact: passed, failed or not checked, with figures or the reason."""
    _show(
        {
            **{each.name: _verdict_in_words(each) for each in result.verdicts},
            "Runtime": ", ".join(result.runtimes) or "none",
            "Facts": result.summary,
        }
    )


def _verdict_in_words(verdict: Verdict) -> str:
    if verdict.deviation is None:
        return f"not checked: {verdict.problem}"
    figures = f"deviation {verdict.deviation:.3g}, allowed {verdict.tolerance:.3g}"
    if verdict.status == "passed":
        return f"passed: {figures}"
    return f"FAILED: {figures}; published {verdict.expected}; found {verdict.found}"


def _whole_text_rows(result: QualityResult) -> dict[str, str]:
    whole = result.whole_text
    if whole is None:
        return {}
    return {
        "Whole text": f"word perplexity {_perplexity(whole.word_perplexity)}, byte perplexity "
        f"{_perplexity(whole.byte_perplexity)}, {whole.bits_per_byte:.4f} bits per byte, over "
        f"{whole.words} words in {whole.bytes} bytes, {whole.tokens} tokens"
    }


def _perplexity(value: float | None) -> str:
    return "too large" if value is None else f"{value:.4f}"


def _task_rows(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    return {
        f"Task {name}": ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        for name, metrics in tasks.items()
    }


def _runtime(name: str, fallback_reason: str | None) -> str:
    return name if fallback_reason is None else f"{name}; not TensorRT: {fallback_reason}"


def _show(rows: Mapping[str, str]) -> None:
    """Print names and values as two columns; keeps line breaks of values."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else LOG_WIDTH
    indent = max(map(len, rows)) + 2
    for name, value in rows.items():
        lines = [
            part
            for line in value.splitlines() or [""]
            for part in _wrap(line, max(20, width - indent)) or [""]
        ]
        for label, line in zip([name, *[""] * len(lines)], lines, strict=False):
            print(f"{label:{indent}}{line}".rstrip(), flush=True)


def _wrap(line: str, width: int) -> list[str]:
    """Break a line between words only, so that paths can be copied."""
    return textwrap.wrap(line, width, break_on_hyphens=False, break_long_words=False)
