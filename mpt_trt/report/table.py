"""Makes the table of a report: its columns on the page, and all figures as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from mpt_trt.report.entries import Entry
from mpt_trt.report.numbers import TIMES, number, with_error

BASE_VARIANT = "fp16"
"""Variant that other sizes are compared with."""
MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Column:
    """A column of the table. name, unit: its header. values: the text of each engine's cell."""

    name: str
    unit: str
    values: list[str]
    is_text: bool = False


def column_groups(entries: list[Entry]) -> dict[str, list[Column]]:
    """Makes all columns after the engine's name, grouped by subject, the most important first."""
    return {
        "Overview": _overview_columns(entries),
        "Held-out text": _text_columns(entries),
        "Speed, tokens/s": _speed_columns(entries),
        "Size on disk": _size_columns(entries),
        "Run": _run_columns(entries),
    }


def _overview_columns(entries: list[Entry]) -> list[Column]:
    networks = [entry.quality.size.networks for entry in entries]
    unit, divisor = _size_unit(networks)
    changes = [entry.perplexity_change for entry in entries]
    rates = [entry.quality.speed.decode_tokens_per_s for entry in entries]
    return [
        Column("Smoke test", "", [_verdict(entry) for entry in entries], is_text=True),
        Column("Weights", unit, [number(size / divisor) for size in networks]),
        Column("Perplexity", "% change", [with_error(each, 100, True) for each in changes]),
        Column("Generating", "tokens/s", list(map(number, rates))),
    ]


def _verdict(entry: Entry) -> str:
    return "passed" if entry.smoke.passed else "FAILED"


def _size_unit(sizes: list[int]) -> tuple[str, float]:
    return ("GB", 1e9) if max(sizes) >= 1e10 else ("MB", 1e6)


def _size_columns(entries: list[Entry]) -> list[Column]:
    networks = [entry.quality.size.networks for entry in entries]
    plans = [entry.quality.size.plans for entry in entries]
    unit, divisor = _size_unit(networks)
    return [
        Column("Weights", f"{TIMES} {BASE_VARIANT}", _multiples(entries, networks)),
        Column("Plan", unit, [number(size / divisor) for size in plans]),
    ]


def _text_columns(entries: list[Entry]) -> list[Column]:
    figures = [entry.quality.figures for entry in entries]
    return [
        Column("Mean KL", "nats", [with_error(each.kl) for each in figures]),
        Column("Same top token", "%", [with_error(each.top1, 100) for each in figures]),
        Column("Perplexity", "", [number(each.perplexity, 5) for each in figures]),
        *_whole_text_columns(entries),
        *_task_columns(entries),
    ]


def _whole_text_columns(entries: list[Entry]) -> list[Column]:
    wholes = [entry.quality.whole_text for entry in entries]
    if not any(wholes):
        return []
    words = [MISSING if each is None else _perplexity(each.word_perplexity) for each in wholes]
    sizes = [MISSING if each is None else number(each.bits_per_byte, 4) for each in wholes]
    return [
        Column("Whole text", "per word", words),
        Column("Whole text", "bits per byte", sizes),
    ]


def _perplexity(value: float | None) -> str:
    return "too large" if value is None else number(value, 5)


def _task_columns(entries: list[Entry]) -> list[Column]:
    """One column per metric of lm-eval's tasks."""
    results = [entry.quality.tasks for entry in entries]
    found = dict.fromkeys(
        (task, metric) for tasks in results for task, metrics in tasks.items() for metric in metrics
    )
    return [
        Column(task, metric, [_score(tasks.get(task, {}).get(metric)) for tasks in results])
        for task, metric in found
    ]


def _score(value: float | None) -> str:
    return MISSING if value is None else number(value, 4)


def _speed_columns(entries: list[Entry]) -> list[Column]:
    results = [entry.quality for entry in entries]
    rows = results[0].throughput_rows
    return [
        Column("Range", "generating", [_range(result.speed.decode_range) for result in results]),
        Column("Prompt", "", [number(result.speed.prefill_tokens_per_s) for result in results]),
        Column(
            f"{rows} at a time",
            "generating",
            [number(result.throughput.decode_tokens_per_s) for result in results],
        ),
    ]


def _range(bounds: tuple[float, ...]) -> str:
    return f"{number(min(bounds))} {MISSING} {number(max(bounds))}"


def _run_columns(entries: list[Entry]) -> list[Column]:
    distances = [
        f"{number(100 * entry.smoke.distance.error, 2)} of "
        f"{number(100 * entry.smoke.allowed_error, 2)}"
        for entry in entries
    ]
    memory = [number(entry.quality.peak_memory / 1e6) for entry in entries]
    columns = [Column("Error", "% of allowed", distances), Column("Host memory", "MB", memory)]
    # One runtime for all engines is named above the table.
    letters = runtime_letters(entries)
    runtimes = [letters[entry.quality.runtime] for entry in entries]
    return columns + ([Column("Runtime", "", runtimes)] if len(letters) > 1 else [])


def runtime_letters(entries: list[Entry]) -> dict[str, str]:
    """Letters that stand for the runtimes in the table, which has no room for their names."""
    runtimes = dict.fromkeys(entry.quality.runtime for entry in entries)
    return {runtime: chr(ord("A") + index) for index, runtime in enumerate(runtimes)}


def _multiples(entries: list[Entry], sizes: list[int]) -> list[str]:
    """Formats sizes as multiples of the base variant's on the fewest ranks; dashes without it."""
    bases = [
        (entry.quality.ranks, size)
        for entry, size in zip(entries, sizes, strict=True)
        if entry.variant == BASE_VARIANT
    ]
    if not bases:
        return [MISSING] * len(sizes)
    base = min(bases)[1]
    return [f"{size / base:.2f}" for size in sizes]


def table_csv(entries: list[Entry]) -> str:
    """Makes CSV of the figures in full precision, one line per engine."""
    stream = io.StringIO()
    rows = [_csv_row(entry) for entry in entries]
    writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _csv_row(entry: Entry) -> dict[str, object]:
    result, figures = entry.quality, entry.quality.figures
    whole = result.whole_text
    return {
        "variant": entry.variant,
        "ranks": result.ranks,
        "weights_bytes": result.size.networks,
        "plan_bytes": result.size.plans,
        "perplexity": figures.perplexity,
        "reference_perplexity": figures.reference_perplexity,
        "excess_nats_per_token": figures.excess.mean,
        "excess_standard_error": figures.excess.standard_error,
        "mean_kl_nats": figures.kl.mean,
        "mean_kl_standard_error": figures.kl.standard_error,
        "top1": figures.top1.mean,
        "top1_standard_error": figures.top1.standard_error,
        "word_perplexity": None if whole is None else whole.word_perplexity,
        "byte_perplexity": None if whole is None else whole.byte_perplexity,
        "bits_per_byte": None if whole is None else whole.bits_per_byte,
        "decode_tokens_per_s": result.speed.decode_tokens_per_s,
        "decode_tokens_per_s_slowest": min(result.speed.decode_range),
        "decode_tokens_per_s_fastest": max(result.speed.decode_range),
        "prefill_tokens_per_s": result.speed.prefill_tokens_per_s,
        "throughput_rows": result.throughput_rows,
        "throughput_tokens_per_s": result.throughput.decode_tokens_per_s,
        "smoke_test_passed": entry.smoke.passed,
        "smoke_test_error": entry.smoke.distance.error,
        "smoke_test_allowed_error": entry.smoke.allowed_error,
        "smoke_test_max_abs": entry.smoke.distance.max_abs,
        "peak_memory_bytes": result.peak_memory,
        "runtime": result.runtime,
    }
