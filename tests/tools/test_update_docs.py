"""The tool that writes the generated tables of the documentation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mpt_trt.engines import backend_support
from mpt_trt.errors import MptTrtError
from support.paths import REPOSITORY
from tools import update_docs
from tools.markdown import BEGIN, END, between_marks

FILES = tuple(update_docs.tables())


def write_stale(folder: Path) -> None:
    for name in FILES:
        (folder / name).write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")


def test_text_between_the_marks_is_replaced(tmp_path: Path, monkeypatch) -> None:
    write_stale(tmp_path)
    monkeypatch.setattr(sys, "argv", ["update_docs.py", f"--docs_dir={tmp_path}"])
    for _ in range(2):
        update_docs.main()
        for name in FILES:
            text = (tmp_path / name).read_text()
            assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
            assert "stale" not in text
    assert (tmp_path / "requirements.md").read_text().count("### mpt-7b,") == 1
    assert between_marks(tmp_path / "backends.md") == backend_support.table()
    assert "| `tolerance.error_factor` | number | `1.0` |" in (tmp_path / "config.md").read_text()
    assert "| `steps/with_gpus.py` | Run a command" in (tmp_path / "scripts.md").read_text()


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_marks_is_not_changed(tmp_path: Path, name: str) -> None:
    write_stale(tmp_path)
    (tmp_path / name).write_text("text\n")
    with pytest.raises(MptTrtError, match=rf"{name}: lines .* are expected"):
        update_docs.update(tmp_path)
    assert (tmp_path / name).read_text() == "text\n"


@pytest.mark.parametrize("name", ["config.md", "scripts.md", "proofs.md"])
def test_committed_tables_are_current(name: str) -> None:
    committed = between_marks(REPOSITORY / "docs" / name)
    assert committed == update_docs.tables()[name].strip(), "run make docs"
