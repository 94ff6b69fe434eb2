"""Compares a model's engines in `reports/{model}.html`, with its table and plots as files.

The page needs no other files: styles and plots are inside it, and it has no scripts.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.llama_cpp_result import Point, read_llama_cpp
from mpt_trt.evaluation.quality_result import Estimate, QualityResult, read_quality
from mpt_trt.evaluation.smoke_result import SmokeResult, read_smoke_result
from mpt_trt.proofs.result import ProofResult
from mpt_trt.report.numbers import TIMES, number, with_error
from mpt_trt.report.plots import Plot, draw_divergence, draw_frontier, draw_size, draw_speed
from mpt_trt.system.machine import Machine
from mpt_trt.system.replace import replace_file, require_writable

# Variant that other sizes are compared with.
BASE_VARIANT = "fp16"
# Maximum relative increase of perplexity of an engine that is nearly as good as the reference.
NEARLY = 0.01
TABLE = "table.csv"
# Template that ships with mpt-trt.
TEMPLATE = Path(__file__).parent / "page.html.jinja"
MISSING = "\N{EN DASH}"


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


# --- the table -----------------------------------------------------------------------------------


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


# --- the page ------------------------------------------------------------------------------------


def plots(entries: list[Entry], others: Sequence[Point] = ()) -> list[Plot]:
    """Draws size against quality and divergence, distance from the reference, and speed.

    others: llama.cpp's points, for the divergence over size.
    """
    results = [entry.quality for entry in entries]
    labels = [entry.label for entry in entries]
    # One point per variant, because ranks share the same weights.
    fewest = {entry.variant: entry for entry in reversed(entries)}
    single = [entry for entry in entries if fewest[entry.variant] is entry]
    return [
        draw_size(
            [entry.variant for entry in single],
            [entry.quality.size.networks / 1e6 for entry in single],
            [entry.quality.figures.perplexity for entry in single],
            results[0].figures.reference_perplexity,
        ),
        draw_frontier(
            [entry.variant for entry in single],
            [entry.quality.size.networks / 1e6 for entry in single],
            [entry.quality.figures.kl.mean for entry in single],
            others,
        ),
        draw_divergence(labels, [result.figures.kl for result in results]),
        draw_speed(labels, _rates(results), [result.runtime for result in results]),
    ]


def _rates(results: list[QualityResult]) -> dict[str, list[float]]:
    together = f"generating {results[0].throughput_rows} at a time"
    return {
        "generating": [result.speed.decode_tokens_per_s for result in results],
        "reading a prompt": [result.speed.prefill_tokens_per_s for result in results],
        together: [result.throughput.decode_tokens_per_s for result in results],
    }


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


def _joined(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


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


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _machine_text(machine: Machine) -> str:
    gpus = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    cores = "1 core" if machine.cores == 1 else f"{machine.cores} cores"
    return (
        f"{machine.processor}, {cores}, {number(machine.memory_gib)} GiB, {gpus}; "
        f"{machine.system}, Python {machine.python}"
    )


def page(
    model: str,
    entries: list[Entry],
    template: Path,
    drawn: list[Plot],
    proof: ProofResult | None = None,
) -> str:
    """Renders the report as HTML. proof: the engines' comparison with published facts, if any."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(
        model=model,
        entries=entries,
        groups=column_groups(entries),
        plots=drawn,
        runtime=runtime_in_words(entries),
        runtimes=runtime_letters(entries),
        samples=samples(entries),
        findings=findings(entries),
        conditions={name: texts for name, texts in conditions(entries).items() if texts},
        first=entries[0].quality,
        reference_perplexity=number(entries[0].quality.figures.reference_perplexity, 5),
        base=BASE_VARIANT,
        proof=proof,
    )


def write_report(
    model: str,
    entries: list[Entry],
    template: Path,
    target: Path,
    items: Path,
    inputs: Iterable[Path] = (),
    proof: ProofResult | None = None,
    others: Sequence[Point] = (),
    more_plots: Iterable[Plot] = (),
) -> None:
    """Writes the page `target`, and its table and plots into the folder `items`.

    inputs: see `replace_file`; nothing is written if one of them would be replaced. proof: see
    `page`. others: points of llama.cpp. more_plots: plots that only the page shows.
    """
    require_comparable(entries)
    drawn = plots(entries, others)
    contents = {
        items / TABLE: table_csv(entries),
        **{items / f"{plot.name}.svg": plot.svg for plot in drawn},
        target: page(model, entries, template, [*drawn, *more_plots], proof),
    }
    inputs = (*inputs, template)
    for path in contents:
        require_writable(path, inputs)
    for path, content in contents.items():
        with replace_file(path, inputs) as partial:
            partial.write_text(content, encoding="utf-8")
