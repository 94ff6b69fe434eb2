"""Plots of a report, as SVG with the page's colours and the reader's font.

Colour is never the only information: every point and bar has its name next to it. Text stays text,
so readers can search it, scale it and have it read aloud.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from mpt_trt.evaluation.llama_cpp_result import Point
from mpt_trt.evaluation.quality_result import Estimate
from mpt_trt.report.numbers import number

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Drawn colours, and the page's variables that replace them, with a value for use without the page.
# Colour-blind people can distinguish these colours of Okabe and Ito's palette.
COLOURS = {
    "#000001": "var(--ink, #1b1f24)",
    "#000002": "var(--faint, #6a737d)",
    "#000003": "var(--grid, #d8dee4)",
    "#000007": "var(--paper, #ffffff)",
    "#000004": "var(--series-1, #0072b2)",
    "#000005": "var(--series-2, #d55e00)",
    "#000006": "var(--series-3, #009e73)",
}
INK, FAINT, GRID, PAPER, *SERIES = COLOURS
HATCHES = ("", "////", "....")
STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
}
WIDTH = 4.7  # inches; text has its nominal size at a phone's width
ROW = 0.27
# Smaller values are drawn at the edge, because float32 logits do not resolve them.
LEAST_KL = 1e-13
# Of the plot over size, where engines of few bits need the room.
LEAST_FRONTIER_KL = 1e-7
# Times as far from the base as two thirds of the values are.
OUTLIER = 6
# ... and as this share of the base.
LEAST_OUTLIER = 0.2
# The axis of perplexity spans at least this share of the reference's.
LEAST_SPAN = 0.02


@dataclass(frozen=True)
class Plot:
    """A plot. name: stem of its file. svg: a complete SVG element."""

    name: str
    title: str
    caption: str
    svg: str


def draw_size(
    labels: Sequence[str], megabytes: Sequence[float], perplexities: Sequence[float], base: float
) -> Plot:
    """Draws perplexity over the size of the weights; `base` is the reference's perplexity."""
    with figure_of(max(3.0, ROW * len(labels) + 0.9)) as figure:
        axes = figure.subplots()
        figure.subplots_adjust(left=0.15, right=0.62, bottom=0.16, top=0.97)
        axes.axhline(base, color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
        _size_axes(axes, megabytes, "perplexity")
        far = _outliers(perplexities, base)
        near = [y for y in perplexities if y not in far]
        bottom, top = _span([*near, base], base)
        axes.set_ylim(bottom, top)
        for size, y in zip(megabytes, perplexities, strict=True):
            # Points beyond the axis are drawn at its end, as arrowheads.
            marker = "o" if y in near else "^" if y > base else "v"
            shown = min(max(y, bottom), top)
            axes.plot(size, shown, marker, color=SERIES[0], markersize=6, clip_on=False)
        points = [*zip(megabytes, perplexities, labels, strict=True)]
        names = [
            (size, min(max(y, bottom), top), label if y in near else f"{label}: {number(y)}")
            for size, y, label in points
        ]
        _label_at_the_side(axes, names, figure.get_figheight())
        told = ", ".join(f"{label} {number(size)} MB {number(y, 5)}" for size, y, label in points)
        return finish_plot(
            figure,
            "size",
            "Size against quality",
            "Perplexity on held-out text (lower is better) over the size of the weights on disk. "
            "The dashed line is the float32 reference, each point a variant; an arrowhead "
            "at the edge stands for a point beyond it.",
            f"Reference {number(base, 5)}. {told}.",
        )


def draw_frontier(
    variants: Sequence[str],
    sizes: Sequence[float],
    distances: Sequence[float],
    others: Sequence[Point] = (),
) -> Plot:
    """Draws the mean KL, on a logarithmic scale, over the size of the weights in MB.

    A line joins the variants of the frontier, to which no other is both smaller and nearer. others:
    points of llama.cpp.
    """
    labels = [*variants, *(point.name for point in others)]
    megabytes = [*sizes, *(point.megabytes for point in others)]
    divergences = [*distances, *(point.kl for point in others)]
    with figure_of(max(3.0, ROW * len(labels) + 0.9)) as figure:
        axes = figure.subplots()
        figure.subplots_adjust(left=0.15, right=0.62, bottom=0.16, top=0.97)
        heights = [math.log10(max(each, LEAST_FRONTIER_KL)) for each in divergences]
        is_shown = [each >= LEAST_FRONTIER_KL for each in divergences]
        _size_axes(axes, megabytes, "mean KL, nats")
        _decade_ticks(axes, heights)
        line = _frontier([*zip(sizes, heights[: len(sizes)], strict=True)])
        axes.plot(*zip(*line, strict=True), color=FAINT, linewidth=1)
        for row, (size, y) in enumerate(zip(megabytes, heights, strict=True)):
            is_ours = row < len(sizes)
            marker = "v" if not is_shown[row] else "o" if is_ours else "D"
            colour = SERIES[0] if is_ours else SERIES[1]
            axes.plot(size, y, marker, color=colour, markersize=6 if is_ours else 5)
        names = [
            label if inside else f"{label}: {number(kl, 2)}"
            for label, kl, inside in zip(labels, divergences, is_shown, strict=True)
        ]
        points = [*zip(megabytes, heights, names, strict=True)]
        _label_at_the_side(axes, points, figure.get_figheight())
        told = ", ".join(
            f"{label} {number(size)} MB {number(kl)}"
            for label, size, kl in zip(labels, megabytes, divergences, strict=True)
        )
        return finish_plot(
            figure,
            "frontier",
            "Size against divergence",
            "Mean KL divergence from the float32 reference (lower is better, logarithmic) over the "
            "size of the weights on disk, each point a variant"
            + (", each diamond a quantization of llama.cpp" if others else "")
            + ". The line joins the variants to "
            "which no other is both smaller and nearer to the reference; an arrowhead at the edge "
            "stands for a point below it.",
            f"{told}.",
        )


def _size_axes(axes: Axes, megabytes: Sequence[float], quantity: str) -> None:
    """Labels the axes of a plot over the size of the weights. quantity: that of the other axis."""
    axes.set_xlim(0, max(megabytes) * 1.08)
    axes.set_xlabel("weights, MB")
    axes.set_ylabel(quantity)
    axes.grid(True)
    axes.set_axisbelow(True)


def _decade_ticks(axes: Axes, heights: Sequence[float]) -> None:
    """Marks the powers of ten around values on the y-axis. heights: their decimal logarithms."""
    lowest = math.floor(min(heights))
    highest = max(math.ceil(max(heights)), lowest + 1)
    axes.set_ylim(lowest - 0.2, highest + 0.2)
    ticks = range(lowest, highest + 1)
    axes.set_yticks(ticks, [f"$10^{{{tick}}}$" for tick in ticks])


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Selects the points that are lower than all smaller ones, by size."""
    selected: list[tuple[float, float]] = []
    for point in sorted(points):
        if not selected or point[1] < selected[-1][1]:
            selected.append(point)
    return selected


def draw_divergence(labels: Sequence[str], divergences: Sequence[Estimate]) -> Plot:
    """Draws the mean KL of each engine on a logarithmic axis."""
    with figure_of(ROW * len(labels) + 0.85) as figure:
        axes = _row_axes(figure, labels)
        means = [max(divergence.mean, LEAST_KL) for divergence in divergences]
        errors = [divergence.standard_error or 0 for divergence in divergences]
        # Bars end at a tenth of the mean, because the axis is logarithmic.
        lower = [min(error, 0.9 * mean) for mean, error in zip(means, errors, strict=True)]
        axes.set_xscale("log")
        axes.errorbar(
            means,
            range(len(labels)),
            xerr=[lower, errors],
            fmt="o",
            color=SERIES[0],
            markersize=6,
            capsize=3,
            linewidth=1.2,
        )
        # Room for the numbers to the right of the points.
        axes.set_xlim(min(means) / 10, max(means) * 10 ** (1 + 0.3 * _decades(means)))
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.set_xlabel("mean KL(reference || engine), nats")
        told = [number(divergence.mean, 2) for divergence in divergences]
        for row, (mean, text) in enumerate(zip(means, told, strict=True)):
            _write_next_to(axes, mean, row, text, 8)
        return finish_plot(
            figure,
            "divergence",
            "Distance from the reference",
            "Mean KL divergence of the next-token distributions, on a logarithmic scale (further "
            "left is better), with standard errors.",
            ", ".join(f"{label} {text}" for label, text in zip(labels, told, strict=True)) + ".",
        )


def draw_speed(
    labels: Sequence[str], panels: Mapping[str, Sequence[float]], runtimes: Sequence[str]
) -> Plot:
    """Draws bars of tokens/s. panels: the engines' rates by the work that is measured."""
    kinds = list(dict.fromkeys(runtimes))
    legend = 0.22 * len(kinds) if len(kinds) > 1 else 0
    with figure_of(len(panels) * (ROW * len(labels) + 0.75) + legend) as figure:
        column = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        height = figure.get_figheight()
        figure.subplots_adjust(
            left=_label_width(labels),
            right=0.97,
            bottom=0.55 / height,
            top=1 - (legend + 0.05) / height,
            hspace=0.75 / (ROW * len(labels)),
        )
        for axes, (name, rates) in zip(column, panels.items(), strict=True):
            rows_of(axes, labels)
            # A bar that would flatten all others ends at the edge, with its number inside.
            far = _outliers(rates, 0.0)
            longest = max(rate for rate in rates if rate not in far) * 1.25
            for row, (rate, runtime) in enumerate(zip(rates, runtimes, strict=True)):
                _bar(axes, row, min(rate, longest), kinds.index(runtime))
                if rate in far:
                    _write_at_the_edge(axes, longest, row, f"{number(rate)} \N{RIGHTWARDS ARROW}")
                else:
                    _write_next_to(axes, rate, row, number(rate), 3)
            axes.set_xlim(0, longest)
            axes.set_xlabel(f"{name}, tokens/s")
        if legend:
            handles = [_bar(column[0], 0, 0, kind) for kind in range(len(kinds))]
            figure.legend(handles, kinds, loc="upper left", fontsize=8)
        told = (
            f"{name}: "
            + ", ".join(f"{label} {number(r)}" for label, r in zip(labels, rates, strict=True))
            for name, rates in panels.items()
        )
        return finish_plot(
            figure,
            "speed",
            "Speed",
            "Tokens per second of one sequence, and of several at a time, under the runtime that "
            "the table names (longer is better).",
            f"{'; '.join(told)}.",
        )


# --- parts ---------------------------------------------------------------------------------------


@contextmanager
def figure_of(height: float) -> Iterator[Figure]:
    """Makes a figure of this height in inches, in the report's style."""
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(WIDTH, height))


def _outliers(values: Sequence[float], base: float) -> list[float]:
    """Values so far from `base` that the others would be indistinguishable next to them.

    At most a third of the values, because more of them define the scale.
    """
    distances = sorted(abs(value - base) for value in values)
    typical = distances[(2 * len(distances) - 1) // 3]
    least = max(OUTLIER * typical, LEAST_OUTLIER * base)
    return [value for value in values if abs(value - base) > least]


def _span(values: Sequence[float], base: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), (LEAST_SPAN * base - (high - low)) / 2)
    return low - margin, high + margin


def _label_at_the_side(
    axes: Axes, points: list[tuple[float, float, str]], figure_height: float
) -> None:
    """Writes names of points (x, y, name) in a column at the right, with lines to the points."""
    bottom, top = axes.get_ylim()
    gap = (top - bottom) * 0.16 / figure_height / 0.81
    ordered = sorted(points, key=lambda point: (point[1], point[0]))
    heights = _spread([y for _, y, _ in ordered], gap, bottom, top)
    for (x, y, name), height in zip(ordered, heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.07, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            annotation_clip=False,
            # From the name's left edge, so that no line crosses another name.
            arrowprops={
                "arrowstyle": "-",
                "color": FAINT,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkB": 3,
            },
        )


def _spread(heights: Sequence[float], gap: float, bottom: float, top: float) -> list[float]:
    """Moves ascending heights until they are `gap` apart, between `bottom` and `top`."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap if placed else bottom))
    ceiling = top
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def _row_axes(figure: Figure, labels: Sequence[str]) -> Axes:
    axes = figure.subplots()
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=_label_width(labels), right=0.97, bottom=0.6 / height, top=1 - 0.05 / height
    )
    rows_of(axes, labels)
    return axes


def _label_width(labels: Sequence[str]) -> float:
    """Share of the figure's width for the names of rows at 9 points."""
    return min(0.5, 0.03 + 0.0165 * max(map(len, labels)))


def rows_of(axes: Axes, labels: Sequence[str]) -> None:
    """Gives each label a row, from top to bottom."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)


def _bar(axes: Axes, row: int, length: float, kind: int) -> Rectangle:
    """Draws a bar with the colour and hatching of its runtime, number `kind`."""
    [bar] = axes.barh(
        row,
        length,
        height=0.62,
        color=SERIES[kind % len(SERIES)],
        hatch=HATCHES[kind % len(HATCHES)],
        edgecolor=INK if kind else "none",
        linewidth=0,
    )
    return bar


def _write_next_to(axes: Axes, x: float, row: int, text: str, points: float) -> None:
    axes.annotate(
        text, (x, row), xytext=(points, 0), textcoords="offset points", va="center", fontsize=8
    )


def _write_at_the_edge(axes: Axes, x: float, row: int, text: str) -> None:
    axes.annotate(
        text,
        (x, row),
        xytext=(-4, 0),
        textcoords="offset points",
        va="center",
        ha="right",
        fontsize=8,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5},
    )


def _decades(values: Sequence[float]) -> float:
    return math.log10(max(values) / min(values))


def finish_plot(figure: Figure, name: str, title: str, caption: str, told: str) -> Plot:
    """Renders a figure. told: its content in words, for screen readers."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        # No date, so that the same figures give the same bytes.
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return Plot(name, title, caption, _inline(stream.getvalue(), name, title, told))


def _inline(svg: str, name: str, title: str, told: str) -> str:
    """Extracts the SVG element, with the page's colours and a text for screen readers.

    Its ids get the prefix `name`, because other plots of the page have the same ones.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r'font-family: [^;"]*', "font-family: system-ui, sans-serif", body)
    for drawn, colour in COLOURS.items():
        body = body.replace(drawn, colour)
    head, rest = body.split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    labels = f'role="img" aria-labelledby="{name}-title {name}-told"'
    texts = (
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-told">{escape(told)}</desc>'
    )
    return f"{head} {labels}>{texts}{rest}"
