"""The plot of speeds over batch sizes, prompt lengths and output lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from mpt_trt.evaluation.throughput import Load, LoadSpeed, ThroughputResult, read_throughput
from mpt_trt.report.numbers import number
from mpt_trt.report.plots import ROW, SERIES, Plot, figure_of, finish_plot, rows_of

# Engines differ in colour and in marker.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LEGEND_ROW = 0.19  # inches


@dataclass(frozen=True)
class Series:
    """An engine and its speeds by load."""

    label: str
    result: ThroughputResult

    @property
    def speeds(self) -> dict[Load, LoadSpeed]:
        return {speed.load: speed for speed in self.result.speeds}


def read_series(labels: Sequence[str], paths: Sequence[Path]) -> list[Series]:
    """Reads results; raises MptTrtError when a file is not a result. labels: of the engines."""
    return [Series(label, read_throughput(path)) for label, path in zip(labels, paths, strict=True)]


def _first_token(speed: LoadSpeed) -> float:
    return 1e3 * speed.first_token_s.median


def _between(speed: LoadSpeed) -> float | None:
    return None if speed.between_tokens_s is None else 1e3 * speed.between_tokens_s.median


def _slowest(speed: LoadSpeed) -> float | None:
    return None if speed.between_tokens_s is None else 1e3 * speed.between_tokens_s.p99


def _rate(speed: LoadSpeed) -> float:
    return speed.tokens_per_s


Reader = Callable[[LoadSpeed], float | None]
# Name of each panel's axis, its figure, and the end of a line that is drawn from there.
PANELS: tuple[tuple[str, Reader, Reader | None], ...] = (
    ("to the first token, ms", _first_token, None),
    ("between tokens, ms; lines to the 99th percentile", _between, _slowest),
    ("new tokens/s of all rows", _rate, None),
)


def draw_throughput(series: Sequence[Series]) -> Plot:
    """Draws a panel for each of three figures, with a row per load and a marker per engine."""
    loads = list(dict.fromkeys(load for each in series for load in each.speeds))
    names = [f"{load.batch_size} x {load.prompt_len} + {load.new_tokens}" for load in loads]
    panel, legend = ROW * len(loads) + 0.75, LEGEND_ROW * len(series) + 0.1
    with figure_of(len(PANELS) * panel + legend) as figure:
        height = figure.get_figheight()
        every = figure.subplots(len(PANELS), 1)
        figure.subplots_adjust(
            left=0.27,
            right=0.97,
            bottom=0.55 / height,
            top=1 - (legend + 0.05) / height,
            hspace=0.75 / (ROW * len(loads)),
        )
        for axes, (name, found, end) in zip(every, PANELS, strict=True):
            rows_of(axes, names)
            for index, each in enumerate(series):
                _draw(axes, index, [each.speeds.get(load) for load in loads], found, end)
            axes.set_xlim(left=0)
            axes.set_xlabel(name)
        handles = every[0].get_lines()[: len(series)]
        labels = [f"{each.label}, {_memory(each.result)}" for each in series]
        figure.legend(handles, labels, loc="upper left", fontsize=8)
        return finish_plot(
            figure,
            "throughput",
            "Speed under load",
            "Each row is a load: batch size x prompt tokens + new tokens. For times, further "
            "left is better, for tokens/s further right. The legend gives the peak of host memory.",
            " ".join(_told(each) for each in series),
        )


def _draw(
    axes: Axes, index: int, speeds: list[LoadSpeed | None], found: Reader, end: Reader | None
) -> None:
    colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
    points = [
        (value, row, speed)
        for row, speed in enumerate(speeds)
        if speed is not None and (value := found(speed)) is not None
    ]
    values, rows = [value for value, _, _ in points], [row for _, row, _ in points]
    axes.plot(values, rows, marker, color=colour, markersize=5.5, linestyle="none")
    for value, row, speed in points:
        if end is not None and (last := end(speed)) is not None:
            axes.plot([value, last], [row, row], color=colour, linewidth=1)


def _memory(result: ThroughputResult) -> str:
    return f"{number(result.peak_memory / 1e6)} MB"


def _told(series: Series) -> str:
    """The engine's figures in words."""
    parts = []
    for load, speed in series.speeds.items():
        gap = _between(speed)
        between = "" if gap is None else f", between tokens {number(gap)} ms"
        parts.append(
            f"{load.batch_size} x {load.prompt_len} + {load.new_tokens}: first token "
            f"{number(_first_token(speed))} ms{between}, {number(speed.tokens_per_s)} tokens/s"
        )
    return f"{series.label}, {_memory(series.result)}: {'; '.join(parts)}."
