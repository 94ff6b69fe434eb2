"""The last line of a step's progress."""

from __future__ import annotations

import re

import pytest

from mpt_trt.system.progress_lines import ProgressLines


@pytest.mark.parametrize(("done", "amounts"), [(7, "7 of 7"), (6, "6")])
def test_the_last_line_does_not_look_unfinished(
    done: int, amounts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The total of networks counts parts of a table that ranks share more than once."""
    progress = ProgressLines("Writing", 7, lambda count: f"{count:.0f}")
    for _ in range(done):
        progress.advance()
    progress.stop()
    line = capsys.readouterr().err
    assert re.fullmatch(rf"Writing: {amounts} in [\d.]+ s\n", line), line
