"""Reports: numbers for people, the page, its plots and its table."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mpt_trt.cli.results import show_quality
from mpt_trt.engines.spec import BuilderInfo
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.distance import Distance, Tolerance
from mpt_trt.evaluation.llama_cpp_result import LlamaCppResult, Point
from mpt_trt.evaluation.measured_engine import MeasuredEngine
from mpt_trt.evaluation.quality_result import (
    Estimate,
    Figures,
    QualityResult,
    Size,
    WholeText,
    read_quality,
    write_quality,
)
from mpt_trt.evaluation.smoke_result import SmokeResult, write_smoke_result
from mpt_trt.evaluation.speed import Speed
from mpt_trt.evaluation.throughput import (
    Load,
    LoadSpeed,
    Spread,
    ThroughputResult,
    write_throughput,
)
from mpt_trt.proofs.result import ProofResult, Verdict
from mpt_trt.report import page as report_page
from mpt_trt.report.entries import Entry, read_entry, read_points, require_comparable
from mpt_trt.report.numbers import number, with_error
from mpt_trt.report.page import TEMPLATE, plots, write_report
from mpt_trt.report.plots import _outliers, _spread, draw_frontier, draw_size, draw_speed
from mpt_trt.report.sentences import findings, runtime_in_words
from mpt_trt.report.table import column_groups
from mpt_trt.report.throughput_plot import draw_throughput, read_series
from mpt_trt.system.machine import Machine
from support.engines import call_tool, one_line_error, run_tool

BASE_NATS = 2.4


def result(kl: float, excess: float, megabytes: float, ranks: int = 1) -> QualityResult:
    return QualityResult(
        engine_dir="trt_engines/some/where",
        model_name="model",
        ranks=ranks,
        dtype="float16",
        quantization={"method": "int4_awq", "group_size": 64},
        kv_cache="int8",
        builder=BuilderInfo("tensorrt_rtx", "1.7.1", ("8.9",)),
        runtime="ONNX Runtime 1.32.0 (CPUExecutionProvider)",
        fallback_reason="no NVIDIA GPU found",
        machine=Machine("Some <CPU>", 2, 23.5, (), "Linux", "3.11"),
        date="2026-11-25",
        reference="transformers 5.14.1, float32",
        text="heldout.txt",
        text_hash="xxh3:0",
        window_length=512,
        figures=Figures(
            nats_per_token=Estimate(BASE_NATS + excess, 0.1),
            perplexity=math.exp(BASE_NATS + excess),
            reference_nats_per_token=Estimate(BASE_NATS, 0.1),
            reference_perplexity=math.exp(BASE_NATS),
            excess=Estimate(excess, 0.002),
            kl=Estimate(kl, kl / 10),
            top1=Estimate(0.98, 0.001),
            windows=16,
            tokens=8192,
        ),
        size=Size(int(2e6 * megabytes), int(1e6 * megabytes), int(3e6 * megabytes)),
        speed=Speed(4000.0, 321.0, (3900.0, 4100.0), (300.0, 330.0), 5),
        throughput=Speed(9000.0, 1234.0, (8900.0, 9100.0), (1200.0, 1250.0), 5),
        throughput_rows=8,
        prompt_len=128,
        new_tokens=32,
        peak_memory=150_000_000,
    )


VERDICTS = (
    Verdict(
        "greedy <tokens>", "greedy_tokens", "somebody", "float16, 1 rank", "failed",
        "1 2", "1 3", 0.25, 0.05, "rounding", None,
    ),
    Verdict(
        "weights", "rank_weights", "somebody", "float16, 2 ranks", "not checked",
        "", "", None, 10, "rounding", "there is no engine",
    ),
)  # fmt: skip
PROOF = ProofResult("toy", "2026-11-29", ("engine",), ("ONNX Runtime",), VERDICTS)


def smoke_result(quality: QualityResult) -> SmokeResult:
    return SmokeResult(
        engine_dir=quality.engine_dir,
        engines=("rank0.engine",),
        builder=quality.builder,
        ranks=quality.ranks,
        dtype=quality.dtype,
        quantization=quality.quantization,
        kv_cache="auto",
        runtime=quality.runtime,
        fallback_reason=quality.fallback_reason,
        prompt="to be or",
        text=" not",
        tokens=(7, 8, 9),
        prompt_len=2,
        speed=quality.speed,
        reference=quality.reference,
        distance=Distance(0.0123, 0.02, 0.001, 0.001, 0.0456, 0.0, 1.0, 2),
        tolerance=Tolerance(1.0, 0.95),
    )


RESULTS = {
    "fp32": result(4e-12, 0.0, 26),
    "fp16": result(5e-7, 1e-5, 13),
    "int4<&>": replace(result(0.09, 0.05, 5.2), runtime="tensorrt 11.0", fallback_reason=None),
    "fp16 ": result(6e-7, 1e-5, 13, ranks=2),
}


def write_inputs(folder: Path, results: dict[str, QualityResult]) -> list[str]:
    """Arguments of make_report.py but for its outputs."""
    quality, smoke = [], []
    for index, entry in enumerate(results.values()):
        quality.append(folder / f"quality{index}.json")
        smoke.append(folder / f"smoke{index}.json")
        write_quality(entry, quality[-1])
        write_smoke_result(smoke_result(entry), smoke[-1])
    names = [name.strip() for name in results]
    return [
        "--model=toy & co", "--variants", *names, "--quality", *map(str, quality),
        "--smoke_tests", *map(str, smoke),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `page.html` and `items/`."""
    folder = tmp_path_factory.mktemp("report")
    arguments = write_inputs(folder, RESULTS)
    outputs = ("--output", folder / "page.html", "--items_dir", folder / "items")
    call_tool("make_report.py", *arguments, *outputs)
    return folder


class Page(HTMLParser):
    """Checks that elements are closed in order; collects attributes and text."""

    VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.cells: list[list[str]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th", "small") and self.cells:
            self.cells[-1][-1] += data


@pytest.fixture(scope="module")
def page(made: Path) -> Page:
    return Page((made / "page.html").read_text(encoding="utf-8"))


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0, 3, "0"),
        (13.139, 3, "13.1"),
        (4547.5, 3, "4,550"),
        (13300.0, 3, "13,300"),
        (10.93704, 5, "10.937"),
        (0.0123, 2, "0.012"),
        (0.9996, 3, "1.00"),
        (5.0137e-7, 3, "5.01 × 10⁻⁷"),
        (-2.5e-11, 2, "−2.5 × 10⁻¹¹"),
        (-3.0, 2, "−3.0"),
        (1.5e7, 2, "1.5 × 10⁷"),
    ],
)
def test_number(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (5.0137e-7, 3.054e-8, "(5.01 ± 0.31) × 10⁻⁷"),
        (0.0908, 0.0091, "0.0908 ± 0.0091"),
        (-0.0268, 0.0102, "−0.027 ± 0.010"),
        (99.951, 0.0218, "99.951 ± 0.022"),
        (11.63, 2.48, "11.6 ± 2.5"),
        (1234.5, 123.4, "1,234 ± 123"),
        (0.00001, 0.4, "0.00 ± 0.40"),
        (1.0, None, "1.00"),
        (0.5, 0.0, "0.500"),
        # The digits of the error, when rounding makes it a power of ten.
        (5.0, 0.0999, "5.00 ± 0.10"),
    ],
)
def test_number_with_its_error(mean, error, text):
    assert with_error(Estimate(mean, error)) == text


def test_changes_show_their_sign():
    assert with_error(Estimate(0.00021, 0.00011), 100, show_sign=True) == "+0.021 ± 0.011"
    assert with_error(Estimate(-0.02, None), 100, show_sign=True) == "−2.00"
    assert with_error(Estimate(0.02, None), 100, show_sign=True) == "+2.00"


# --- the page ------------------------------------------------------------------------------------


def test_page_needs_nothing_else(made: Path, page: Page):
    content = (made / "page.html").read_text(encoding="utf-8")
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.found}
    outside = re.findall(r'(?:src|href|data)="(?!#)[^"]*"|url\((?!#)|@import', content)
    assert outside == []
    # Names of XML's vocabularies are not addresses that a browser opens.
    addresses = set(re.findall(r"https?://[^\s\"<]+", content))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_page_is_for_every_screen_and_reader(made: Path, page: Page):
    content = (made / "page.html").read_text(encoding="utf-8")
    metas = [attributes for tag, attributes in page.found if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert "@media print" in content and "prefers-color-scheme: dark" in content
    assert ("html", {"lang": "en"}) in page.found
    box = next(a for _, a in page.found if a.get("class") == "box")
    assert box["role"] == "region" and box["aria-label"] and box["tabindex"] == "0"


def test_ids_are_unique_and_references_lead_somewhere(made: Path, page: Page):
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    content = (made / "page.html").read_text(encoding="utf-8")
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', content)
    labels = [a["aria-labelledby"].split() for _, a in page.found if "aria-labelledby" in a]
    assert len(labels) == 4
    wanted = {name for pair in used for name in pair if name} | {n for ns in labels for n in ns}
    assert wanted <= set(ids)


def test_table_has_a_row_for_each_engine(page: Page):
    header, *rows = page.cells[1:]
    assert header[:5] == [
        "Engine",
        "Smoke test",
        "WeightsMB",
        "Perplexity% change",
        "Generatingtokens/s",
    ]
    assert [row[0] for row in rows] == ["fp32", "fp16", "int4<&>", "fp16, 2 ranks"]
    assert {len(row) for row in rows} == {len(header)}
    int4 = dict(zip(header, rows[2], strict=True))
    assert int4["WeightsMB"] == "5.20" and int4["Weights× fp16"] == "0.40"
    assert int4["Perplexity"] == number(math.exp(BASE_NATS + 0.05), 5)
    # exp(0.05) - 1, and its derivative times 0.002
    assert int4["Perplexity% change"] == "+5.13 ± 0.21"
    assert int4["Mean KLnats"] == "0.0900 ± 0.0090"
    assert int4["Same top token%"] == "98.00 ± 0.10"
    assert int4["Generatingtokens/s"] == "321" and int4["Runtime"] == "B"
    assert int4["Error% of allowed"] == "1.2 of 2.8"


def test_names_are_escaped(made: Path, page: Page):
    content = (made / "page.html").read_text(encoding="utf-8")
    assert "int4<&>" not in content and "int4&lt;&amp;&gt;" in content
    assert "toy &amp; co: quality" in content and "Some <CPU>" in page.text


def test_page_says_how_the_figures_were_obtained(page: Page):
    for text in (
        "Runtimes: A is ONNX Runtime 1.32.0 (CPUExecutionProvider); B is tensorrt 11.0.",
        "Some <CPU>, 2 cores, 23.5 GiB, no GPU",
        "ONNX Runtime 1.32.0 (CPUExecutionProvider)",
        "no NVIDIA GPU found",
        "tensorrt_rtx 1.7.1 for GPUs of compute capability 8.9",
        "transformers 5.14.1, float32",
        "heldout.txt, 16 windows of 512 tokens",
        "fp16: float16, matrices of the blocks int4_awq (group_size 64), KV cache int8",
        "Smallest weights within 1% of the reference's perplexity: fp16, 13.0 MB.",
    ):
        assert text in page.text, text


def test_plots_stand_alone_and_name_every_engine(made: Path):
    for name in ("size", "frontier", "divergence", "speed"):
        tree = ET.parse(made / "items" / f"{name}.svg").getroot()
        assert tree.tag == "{http://www.w3.org/2000/svg}svg" and tree.get("viewBox")
        texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
        # A point beyond the axis has its value after its name.
        names = {(text or "").split(":")[0] for text in texts}
        assert {"fp32", "fp16", "int4<&>"} <= names, name
        told = tree.find("{http://www.w3.org/2000/svg}desc").text
        assert "int4<&>" in told
        content = (made / "items" / f"{name}.svg").read_text()
        assert not re.search(r"#00000[0-9]\b", content), "a colour that the page does not know"
    # A bar's hatching also tells its runtime.
    assert "tensorrt 11.0" in texts and "<pattern" in content


def test_table_file_has_full_precision(made: Path):
    rows = list(csv.DictReader(io.StringIO((made / "items" / "table.csv").read_text())))
    assert [row["variant"] for row in rows] == ["fp32", "fp16", "int4<&>", "fp16"]
    assert float(rows[2]["perplexity"]) == math.exp(BASE_NATS + 0.05)
    assert (rows[3]["ranks"], rows[1]["weights_bytes"]) == ("2", "13000000")


def test_the_same_results_give_the_same_bytes(made: Path, tmp_path: Path):
    arguments = write_inputs(tmp_path, RESULTS)
    outputs = ("--output", tmp_path / "page.html", "--items_dir", tmp_path / "items")
    call_tool("make_report.py", *arguments, *outputs)
    for path in ("page.html", "items/size.svg", "items/speed.svg", "items/table.csv"):
        assert (tmp_path / path).read_bytes() == (made / path).read_bytes()


def test_one_engine_without_fp16_is_enough(tmp_path: Path):
    single = replace(
        RESULTS["fp32"], figures=replace(RESULTS["fp32"].figures, kl=Estimate(0.0, None))
    )
    arguments = write_inputs(tmp_path, {"odd": single})
    outputs = ("--output", tmp_path / "page.html", "--items_dir", tmp_path / "items")
    call_tool("make_report.py", *arguments, *outputs)
    rows = Page((tmp_path / "page.html").read_text(encoding="utf-8")).cells
    assert rows[-1][:3] == ["odd", "passed", "26.0"] and "–" in rows[-1]


def test_gigabytes_for_large_models(tmp_path: Path):
    arguments = write_inputs(tmp_path, {"fp16": result(1e-6, 0.0, 13_300)})
    outputs = ("--output", tmp_path / "page.html", "--items_dir", tmp_path / "items")
    call_tool("make_report.py", *arguments, *outputs)
    header, row = Page((tmp_path / "page.html").read_text(encoding="utf-8")).cells[1:]
    assert (header[2], row[2]) == ("WeightsGB", "13.3")


@pytest.mark.parametrize(
    "heights", [[], [0.5], [0.0, 0.0, 0.0], [0.9, 0.95, 1.0, 1.0], [0.1, 0.5, 0.51, 0.52, 0.9]]
)
def test_labels_keep_their_distance(heights):
    placed = _spread(heights, 0.1, 0.0, 1.0)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(placed))
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in placed)


# --- mistakes ------------------------------------------------------------------------------------


def test_engines_of_different_text_are_not_compared(tmp_path: Path):
    other = replace(RESULTS["fp16"], text_hash="xxh3:1")
    write_inputs(tmp_path, {"fp32": RESULTS["fp32"], "fp16": other})
    entries = [
        read_entry(name, tmp_path / f"quality{index}.json", tmp_path / f"smoke{index}.json")
        for index, name in enumerate(("fp32", "fp16"))
    ]
    with pytest.raises(MptTrtError, match="fp32 and fp16 were measured on different text"):
        require_comparable(entries)
    with pytest.raises(MptTrtError, match="at least one engine"):
        require_comparable([])


def test_results_come_back_as_they_were(tmp_path: Path):
    write_inputs(tmp_path, RESULTS)
    entry = read_entry("fp32", tmp_path / "quality0.json", tmp_path / "smoke0.json")
    assert entry.quality == RESULTS["fp32"]
    assert entry.smoke == smoke_result(RESULTS["fp32"])
    assert json.loads((tmp_path / "quality0.json").read_text())["size"] == asdict(
        RESULTS["fp32"].size
    )


def test_a_file_of_another_kind_is_named(tmp_path: Path):
    arguments = write_inputs(tmp_path, {"fp32": RESULTS["fp32"]})
    (tmp_path / "smoke0.json").write_text("{}")
    outputs = ("--output", tmp_path / "page.html", "--items_dir", tmp_path / "items")
    result = run_tool("make_report.py", *arguments, *outputs)
    assert "smoke0.json: not a result of a smoke test of this version" in one_line_error(result)
    assert not (tmp_path / "page.html").exists() and not (tmp_path / "items").exists()


def test_lists_of_different_length_are_refused(tmp_path: Path):
    arguments = write_inputs(tmp_path, {"fp32": RESULTS["fp32"]})
    arguments.insert(2, "fp16")
    with pytest.raises(MptTrtError, match="have 2, 1, 1 values"):
        call_tool("make_report.py", *arguments, "--output", "x", "--items_dir", "y")


@pytest.mark.parametrize("place", ["page", "table", "template"])
def test_inputs_are_kept(place: str, tmp_path: Path) -> None:
    arguments = write_inputs(tmp_path, {"fp16": RESULTS["fp16"]})
    template = tmp_path / "template.html"
    template.write_text("kept")
    page, items = tmp_path / "page.html", tmp_path / "items"
    if place == "table":
        items.mkdir()
        quality = Path(arguments[arguments.index("--quality") + 1])
        quality.rename(items / "table.csv")
        arguments[arguments.index("--quality") + 1] = str(items / "table.csv")
    else:
        page = tmp_path / ("quality0.json" if place == "page" else "template.html")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    outputs = ("--output", page, "--items_dir", items, "--template", template)
    with pytest.raises(MptTrtError, match="not replaced, because it is read from"):
        call_tool("make_report.py", *arguments, *outputs)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --- what the page says first --------------------------------------------------------------------


def entry_of(
    variant: str,
    *,
    rates: tuple[float, float, float] = (300.0, 321.0, 330.0),
    is_tensorrt: bool = False,
    passes: bool = True,
    excess: float = 0.0,
) -> Entry:
    """rates: slowest, median and fastest round."""
    slowest, median, fastest = rates
    speed = Speed(4000.0, median, (3900.0, 4100.0), (slowest, fastest), 5)
    runtime, reason = ("TensorRT 11.0", None) if is_tensorrt else ("ONNX Runtime 1.32", "no GPU")
    quality = replace(
        result(1e-3, excess, 10), speed=speed, runtime=runtime, fallback_reason=reason
    )
    smoke = smoke_result(quality)
    if not passes:
        smoke = replace(smoke, distance=replace(smoke.distance, error=9.0))
    return Entry(variant, quality, smoke)


def test_the_fastest_is_named_only_beyond_the_noise() -> None:
    slow = entry_of("slow", rates=(90.0, 100.0, 110.0))
    fast = entry_of("fast", rates=(120.0, 130.0, 140.0))
    near = entry_of("near", rates=(115.0, 118.0, 121.0))
    assert findings([slow, fast])[-1].startswith("Fastest here: fast, 130 tokens/s")
    unclear = findings([slow, fast, near])[-1]
    assert unclear.startswith("No engine is the fastest beyond the noise") and "slow" not in unclear
    assert "fast and near reach about 130 tokens/s" in unclear


def test_a_failed_smoke_test_comes_first() -> None:
    wrong, right = entry_of("wrong", passes=False), entry_of("right", excess=0.005)
    first, second, _ = findings([wrong, right])
    assert first == "Failed the smoke test: wrong."
    # A wrong engine is not recommended, however near its perplexity is.
    assert "right" in second
    assert column_groups([wrong, right])["Overview"][0].values == ["FAILED", "passed"]


def test_the_first_sentence_names_the_runtime() -> None:
    onnx, tensorrt = entry_of("a"), entry_of("b", is_tensorrt=True)
    assert runtime_in_words([onnx]).startswith("ONNX Runtime 1.32 ran the engines' networks, not")
    assert "those of TensorRT" in runtime_in_words([tensorrt])
    assert "do not compare" in runtime_in_words([onnx, tensorrt])
    for entries, has_column in (([onnx, onnx], False), ([onnx, tensorrt], True)):
        names = [column.name for column in column_groups(entries)["Run"]]
        assert ("Runtime" in names) == has_column


@pytest.mark.parametrize(
    ("values", "base", "expected"),
    [
        ([13.1, 13.11, 13.2, 900.0], 13.1, [900.0]),
        ([13.1, 13.1, 13.8], 13.1, []),  # 5 % more leave the others distinguishable
        ([10.0, 12.0, 5000.0], 0.0, [5000.0]),
        ([10.0, 4000.0, 5000.0], 0.0, []),  # two of three are a scale of their own
        ([10.0], 0.0, []),
        ([13.1], 13.1, []),
    ],
)
def test_outliers(values: list[float], base: float, expected: list[float]) -> None:
    assert _outliers(values, base) == expected


def test_an_outlier_keeps_the_others_apart() -> None:
    plot = draw_size(["a", "b", "c", "wild"], [10, 9, 8, 7], [13.1, 13.15, 13.3, 5000.0], 13.1)
    assert "wild: 5,000" in plot.svg and ">5000<" not in plot.svg
    rates = {"generating": [10.0, 12, 5000]}
    assert "5,000 \N{RIGHTWARDS ARROW}" in draw_speed(["a", "b", "c"], rates, ["x"] * 3).svg


def test_a_divergence_below_the_axis_is_written() -> None:
    plot = draw_frontier(["tiny", "usual"], [26, 5], [4.5e-12, 0.03])
    assert f"tiny: {number(4.5e-12, 2)}" in plot.svg and ">usual<" in plot.svg


def test_points_of_llama_cpp(tmp_path: Path) -> None:
    """They are in the plot of divergence only, and must be of the same text."""
    entry = entry_of("fp16")
    quality = entry.quality
    windows = (quality.figures.tokens // quality.window_length, quality.window_length)
    point = Point("llama.cpp Q4_0", 4.0, 0.08, 0.9)
    path = tmp_path / "llama_cpp.json"
    path.write_text(LlamaCppResult("0.3", quality.text_hash, windows, (point,)).to_json())
    assert read_points(path, [entry]) == (point,)
    with_point = {plot.name for plot in plots([entry], [point]) if point.name in plot.svg}
    assert with_point == {"frontier"}
    assert not any("llama.cpp" in plot.svg + plot.caption for plot in plots([entry]))
    path.write_text(LlamaCppResult("0.3", "another", windows, (point,)).to_json())
    with pytest.raises(MptTrtError, match=f"^{path}: measured on other text"):
        read_points(path, [entry])


def test_samples_are_shown(page: Page, made: Path) -> None:
    text = (made / "page.html").read_text(encoding="utf-8")
    assert text.count("<pre> not</pre>") == 1
    assert "<dt>fp32, fp16, int4&lt;&amp;&gt;, fp16, 2 ranks</dt>" in text
    assert "<q>to be or</q>" in text


# --- whole texts, tasks and facts ----------------------------------------------------------------


def made_of(quality: QualityResult) -> Entry:
    return Entry("fp16", quality, smoke_result(quality))


def test_whole_texts_and_tasks_have_columns() -> None:
    whole = WholeText(12.3456, 1.6, 0.71234, 100.0, 50, 10, 60, 512)
    full = replace(RESULTS["fp16"], whole_text=whole, tasks={"wiki": {"acc": 0.75}})
    columns = column_groups([made_of(full), made_of(RESULTS["fp16"])])["Held-out text"]
    found = {(column.name, column.unit): column.values for column in columns}
    assert found["Whole text", "per word"] == ["12.346", "–"]
    assert found["Whole text", "bits per byte"] == ["0.7123", "–"]
    assert found["wiki", "acc"] == ["0.7500", "–"]
    without = column_groups([made_of(RESULTS["fp16"])])["Held-out text"]
    assert "Whole text" not in {column.name for column in without}


def test_perplexities_beyond_all_numbers_are_words(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = WholeText(None, 1.6, 0.71234, 1000.0, 50, 1, 60, 512)
    full = replace(RESULTS["fp16"], whole_text=whole)
    columns = column_groups([made_of(full)])["Held-out text"]
    assert ["too large"] in [list(column.values) for column in columns]
    write_quality(full, tmp_path / "quality.json")
    assert read_quality(tmp_path / "quality.json") == full
    show_quality(full, tmp_path / "quality.json")
    assert "word perplexity too large, byte perplexity 1.6000" in capsys.readouterr().out


def test_published_facts_have_a_section() -> None:
    entries = [made_of(RESULTS["fp16"])]
    shown = report_page.page("toy", entries, TEMPLATE, [], PROOF)
    assert "0 passed, 1 failed, 1 not checked" in shown
    assert '<th class="name" scope="row">greedy &lt;tokens&gt;</th>' in shown
    assert '<td class="text failed">failed</td>' in shown
    assert '<td class="text">not checked: there is no engine</td>' in shown
    assert "Published facts" not in report_page.page("toy", entries, TEMPLATE, [])


# --- speed under load ----------------------------------------------------------------------------


def throughput(rates: dict[Load, float], memory: int) -> ThroughputResult:
    speeds = tuple(
        LoadSpeed(
            load=load,
            first_token_s=Spread(0.0123, 0.02),
            between_tokens_s=None if load.new_tokens == 1 else Spread(0.004, 0.009),
            tokens_per_s=rate,
            rounds=5,
        )
        for load, rate in rates.items()
    )
    quality = asdict(result(1e-4, 1e-3, 10))
    fields = {each.name: quality[each.name] for each in dataclasses.fields(MeasuredEngine)}
    fields["peak_memory"] = memory
    return ThroughputResult(**fields, speeds=speeds)


def test_speed_under_load(tmp_path: Path) -> None:
    """Every engine, load and figure is in the plot and in its words; the page shows it."""
    loads = {Load(1, 128, 1): 55.5, Load(8, 128, 64): 1234.0}
    paths = []
    for number_, rates in enumerate((loads, dict([*loads.items()][:1]))):
        paths.append(tmp_path / f"{number_}.json")
        write_throughput(throughput(rates, (number_ + 1) * 10**8), paths[-1])
    plot = draw_throughput(read_series(["fp16", "int4_gptq"], paths))
    root = ET.fromstring(plot.svg)
    texts = ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    for text in ("fp16, 100 MB", "int4_gptq, 200 MB", "new tokens/s of all rows"):
        assert text in texts
    assert texts.count("1 x 128 + 1") == texts.count("8 x 128 + 64") == 3
    told = "".join(root.find("{http://www.w3.org/2000/svg}desc").itertext())
    assert "8 x 128 + 64: first token 12.3 ms, between tokens 4.00 ms, 1,230 tokens/s" in told
    assert "1 x 128 + 1: first token 12.3 ms, 55.5 tokens/s" in told
    # The page shows it as one more plot.
    quality = result(1e-4, 1e-3, 10)
    engine = Entry("fp16", quality, smoke_result(quality))
    write_report("m", [engine], TEMPLATE, tmp_path / "r.html", tmp_path / "r", more_plots=[plot])
    assert plot.svg in (tmp_path / "r.html").read_text()
    assert not (tmp_path / "r" / "throughput.svg").exists()
