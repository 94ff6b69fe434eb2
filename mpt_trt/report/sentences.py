"""Puts the measurements of a report into words: main findings, and the conditions of measuring."""

from __future__ import annotations

from collections.abc import Iterable

from mpt_trt.evaluation.quality_result import QualityResult
from mpt_trt.report.entries import Entry
from mpt_trt.report.numbers import number
from mpt_trt.system.machine import Machine

NEARLY = 0.01
"""Maximum relative increase of perplexity of an engine that is nearly as good as the reference."""


def runtime_in_words(entries: list[Entry]) -> str:
    """Describes the runtime and its meaning for speed, in the report's first sentence."""
    results = [entry.quality for entry in entries]
    runtimes = list(dict.fromkeys(result.runtime for result in results))
    if all(result.fallback_reason is None for result in results):
        return f"{_joined(runtimes)} ran the engines: speeds are those of TensorRT on this machine."
    if all(result.fallback_reason is not None for result in results):
        return (
            f"{_joined(runtimes)} ran the engines' networks, not TensorRT: compare speeds only "
            "with each other, because TensorRT's differ."
        )
    return (
        f"{_joined(runtimes)} ran the engines, as the table shows: do not compare speeds of "
        "different runtimes."
    )


def findings(entries: list[Entry]) -> list[str]:
    """Main findings of the table, in sentences."""
    failed = [entry.label for entry in entries if not entry.smoke.passed]
    verdict = [f"Failed the smoke test: {', '.join(failed)}."] if failed else []
    by_size = sorted(entries, key=lambda entry: (entry.quality.size.networks, entry.quality.ranks))
    good = [
        entry for entry in by_size if entry.perplexity_change.mean <= NEARLY and entry.smoke.passed
    ]
    smallest = f"No engine is within {NEARLY:.0%} of the reference's perplexity."
    if good:
        size = number(good[0].quality.size.networks / 1e6)
        smallest = (
            f"Smallest weights within {NEARLY:.0%} of the reference's perplexity: "
            f"{good[0].label}, {size} MB."
        )
    return [*verdict, smallest, _fastest(entries)]


def _fastest(entries: list[Entry]) -> str:
    """The fastest engine, or those that the rounds do not tell apart from it."""
    best = max(entries, key=lambda entry: entry.quality.speed.decode_tokens_per_s)
    slowest_round = min(best.quality.speed.decode_range)
    as_fast = [
        entry.label
        for entry in entries
        if entry is best or max(entry.quality.speed.decode_range) >= slowest_round
    ]
    rate = number(best.quality.speed.decode_tokens_per_s)
    if len(as_fast) == 1:
        return f"Fastest here: {best.label}, {rate} tokens/s for one sequence."
    return (
        f"No engine is the fastest beyond the noise of the rounds: {_joined(as_fast)} reach about "
        f"{rate} tokens/s for one sequence."
    )


def samples(entries: list[Entry]) -> dict[str, list[str]]:
    """The engines' labels by the text that they generated in the smoke test."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        found.setdefault(entry.smoke.text, []).append(entry.label)
    return found


def conditions(entries: list[Entry]) -> dict[str, list[str]]:
    """Machines, software and settings behind the figures, without repetition."""
    results = [entry.quality for entry in entries]
    return {
        "Variants": _distinct(f"{entry.variant}: {_made_of(entry.quality)}" for entry in entries),
        "Machine": _distinct(_machine_text(result.machine) for result in results),
        "Run by": _distinct(result.runtime for result in results),
        "Not by TensorRT": _distinct(
            result.fallback_reason for result in results if result.fallback_reason is not None
        ),
        "Plans built by": _distinct(
            f"{r.builder.package} {r.builder.version} for GPUs of compute capability "
            f"{', '.join(r.builder.compute_capabilities)}"
            for r in results
        ),
        "Reference": _distinct(result.reference for result in results),
        "Text": _distinct(
            f"{result.text}, {result.figures.windows} windows of {result.window_length} tokens"
            for result in results
        ),
        "Measured": _distinct(result.date for result in results),
    }


def _made_of(result: QualityResult) -> str:
    """Data type, quantization and cache type of an engine, in words."""
    options = dict(result.quantization)
    method = options.pop("method")
    given = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    matrices = "" if method == "none" else f", matrices of the blocks {method}"
    cache = "" if result.kv_cache == "auto" else f", KV cache {result.kv_cache}"
    head = "" if result.head == "auto" else f", head and embedding {result.head}"
    return f"{result.dtype}{matrices}{f' ({given})' if given else ''}{head}{cache}"


def _machine_text(machine: Machine) -> str:
    gpus = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    cores = "1 core" if machine.cores == 1 else f"{machine.cores} cores"
    return (
        f"{machine.processor}, {cores}, {number(machine.memory_gib)} GiB, {gpus}; "
        f"{machine.system}, Python {machine.python}"
    )


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _joined(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
