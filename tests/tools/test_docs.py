"""What docs/architecture.md says about the tree."""

from __future__ import annotations

import re
import tomllib

import pytest

from support.paths import REPOSITORY

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
