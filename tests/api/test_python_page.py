"""The examples of docs/python.md, in order, and what they print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from support.paths import REPOSITORY

PAGE = REPOSITORY / "docs" / "python.md"
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def test_examples_print_what_the_page_shows(
    demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trt_engines/mpt-demo/fp32").mkdir(parents=True)
    (tmp_path / "trt_engines/mpt-demo/fp32/1-gpu").symlink_to(demo_engine)
    examples = EXAMPLE.findall(PAGE.read_text())
    assert len(examples) == PAGE.read_text().count("```python")
    names: dict[str, object] = {}
    for code, expected in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == expected
