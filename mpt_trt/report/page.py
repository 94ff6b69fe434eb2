"""Compares a model's engines in `reports/{model}.html`, with its table and plots as files.

The page needs no other files: styles and plots are inside it, and it has no scripts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2

from mpt_trt.evaluation.llama_cpp_result import Point
from mpt_trt.evaluation.quality_result import QualityResult
from mpt_trt.proofs.result import ProofResult
from mpt_trt.report.entries import Entry, require_comparable
from mpt_trt.report.numbers import number
from mpt_trt.report.plots import Plot, draw_divergence, draw_frontier, draw_size, draw_speed
from mpt_trt.report.sentences import conditions, findings, runtime_in_words, samples
from mpt_trt.report.table import BASE_VARIANT, column_groups, runtime_letters, table_csv
from mpt_trt.system.replace import replace_file, require_writable

TABLE = "table.csv"
# Template that ships with mpt-trt.
TEMPLATE = Path(__file__).parent / "page.html.jinja"


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
