"""Quality and reports in the workflow: jobs that run, jobs that are repeated, and why."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from support.workflow import SMALL, Workflow

REPORT = "reports/toy.html"
QUALITY = "quality/toy/{}/{}-gpu.json"
ITEMS = ("table.csv", "size.svg", "frontier.svg", "divergence.svg", "speed.svg")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """fp32 and fp16, and fp16 on two ranks, made up to the report. Tests leave it complete."""
    workflow = Workflow.create(tmp_path_factory.mktemp("workflow") / "project")
    write_text(workflow, "held-out text, of which three windows are read. " * 3)
    jobs = workflow.make(REPORT)
    measured = [job for job in jobs if job.startswith("measure_quality")]
    assert sorted(measured) == ["measure_quality fp16"] * 2 + ["measure_quality fp32"]
    assert jobs.count("compute_reference") == 1 and jobs[-1] == "make_report"
    return workflow


def write_text(workflow: Workflow, content: str) -> None:
    (workflow.folder / "text.txt").write_text(content)


def test_nothing_is_done_twice(made: Workflow) -> None:
    assert made.planned(REPORT) == []


def test_report_shows_what_the_configuration_names(made: Workflow) -> None:
    page = (made.folder / REPORT).read_text(encoding="utf-8")
    assert "<h1>toy: quality of its engines</h1>" in page
    for label in ("fp32", "fp16", "fp16, 2 ranks"):
        assert f'<th class="name" scope="row">{label}</th>' in page
    assert all((made.folder / "reports/toy" / name).stat().st_size for name in ITEMS)


def test_ranks_agree(made: Workflow) -> None:
    one, two = (
        json.loads((made.folder / QUALITY.format("fp16", size)).read_text()) for size in (1, 2)
    )
    assert (one["ranks"], two["ranks"]) == (1, 2)
    found, expected = (result["figures"]["nats_per_token"]["mean"] for result in (two, one))
    assert found == pytest.approx(expected, abs=1e-3)
    assert one["figures"]["tokens"] == 48


def test_snakemakes_own_report_has_the_same_items(made: Workflow) -> None:
    result = made.run("--report", "all.html", REPORT)
    assert result.returncode == 0, result.stdout + result.stderr
    content = (made.folder / "all.html").read_text(encoding="utf-8")
    for item in (*ITEMS, "toy.html", "quality/toy/fp16/2-gpu.json", "smoke_tests/toy/fp32"):
        assert item in content, item
    assert "Engines of toy" in content


def test_another_text_measures_again_and_builds_nothing(made: Workflow) -> None:
    path = made.folder / "text.txt"
    original = path.read_text()
    time.sleep(1.1)  # mtimes of the outputs are compared with the input's
    write_text(made, original + "more")
    try:
        planned = made.planned(REPORT)
    finally:
        write_text(made, original)
        made.make(REPORT)
    assert sorted(planned) == sorted(
        ["compute_reference", "make_report", "measure_quality fp32"] + ["measure_quality fp16"] * 2
    )


@pytest.mark.parametrize(
    ("module", "first"),
    [
        ("report/plots.py", ["make_report"]),
        ("evaluation/perplexity.py", ["measure_quality fp32", "make_report"]),
        ("evaluation/heldout.py", ["compute_reference", "measure_quality fp32", "make_report"]),
    ],
)
def test_an_edited_module_repeats_what_depends_on_it(
    made: Workflow, module: str, first: list[str]
) -> None:
    path = made.folder / "mpt_trt" / module
    original = path.read_text()
    made.edit_module(module)
    try:
        planned = made.planned(REPORT)
    finally:
        path.write_text(original)
    assert [job for job in dict.fromkeys(planned) if job != "measure_quality fp16"] == first


def test_a_variant_more_is_measured_alone(made: Workflow) -> None:
    made.configure(wide={**SMALL, "max_batch_size": 2})
    try:
        planned = made.planned(REPORT)
    finally:
        made.configure()
    assert "measure_quality wide" in planned and "make_report" in planned
    assert not any(job.endswith((" fp16", " fp32")) for job in planned)


def test_windows_without_room_are_refused_before_anything_is_built(made: Workflow) -> None:
    made.configure(short={**SMALL, "max_input_len": 8, "max_output_len": 4})
    try:
        result = made.run("--dry-run", QUALITY.format("short", 1))
    finally:
        made.configure()
    assert result.returncode != 0
    message = "window_length = 16, but a row of the engine's cache holds 12 tokens"
    assert message in result.stdout + result.stderr


def test_an_unknown_variant_in_the_report_gets_a_hint(made: Workflow) -> None:
    config = made.folder / "config.yaml"
    content = config.read_text()
    config.write_text(content.replace("more_tp_sizes:\n    fp16", "more_tp_sizes:\n    fp61"))
    try:
        result = made.run("--dry-run", REPORT)
    finally:
        config.write_text(content)
    assert result.returncode != 0
    assert "no variant named 'fp61'; did you mean 'fp16'?" in result.stdout + result.stderr


def test_a_report_leaves_nothing_half_written(made: Workflow) -> None:
    assert list(Path(made.folder / "reports").rglob(".*partial*")) == []
