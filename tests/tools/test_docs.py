"""Links of the documentation, paths and packages in docs/architecture.md, and `make help`."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from support.paths import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
TEXT = (REPOSITORY / "docs" / "architecture.md").read_text()
FOLDERS = ("mpt_trt", "workflow_scripts", "rules", "tools", "tests", "benchmarks")
FOUND = set(re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/.]*)`", TEXT))
PATHS = sorted(path for path in FOUND if "NAME" not in path)


def test_paths_are_found() -> None:
    assert len(PATHS) > 20


@pytest.mark.parametrize("path", PATHS)
def test_path_exists(path: str) -> None:
    assert (REPOSITORY / path).exists()


def test_types_are_where_they_are_said_to_be() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([\w/.]+)` \|", TEXT, re.MULTILINE)
    assert len(rows) > 5
    for name, path in rows:
        source = (REPOSITORY / path).read_text()
        assert re.search(rf"^class {name}\b", source, re.MULTILINE), name


def test_packages_are_in_the_order_that_is_checked() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    (contract,) = project["tool"]["importlinter"]["contracts"]
    table = TEXT.partition("## Packages")[2].partition("Around the package")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", table, re.MULTILINE)
    assert [row.replace("`", "").replace(", ", " | ") for row in rows] == contract["layers"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = link.partition("#")
        if re.match(r"https?:", path):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            assert heading in anchors(target), link


def test_make_help_lists_every_target() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(makefile.partition(".PHONY:")[2].partition("\n")[0].split())
    shown = subprocess.run(
        ["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"^(\S+)$", shown, re.MULTILINE)) == targets - {"slurm-ready"}


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
