"""The examples in `--help` of every tool are valid commands."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import pytest

from support.paths import REPOSITORY

TOOLS = sorted(
    path
    for folder in ("workflow_scripts", "tools")
    for path in (REPOSITORY / folder).rglob("*.py")
    if "tool_parser(" in path.read_text()
)


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_help_ends_with_an_example_that_the_tool_accepts(path: Path) -> None:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    parser = module.make_parser()
    title, example = parser.format_help().strip().splitlines()[-2:]
    python, script, *arguments = shlex.split(example)
    assert title == "example:" and python == "python" and REPOSITORY / script == path
    parser.parse_args(arguments)


def test_all_tools_are_tested() -> None:
    assert len(TOOLS) > 24
