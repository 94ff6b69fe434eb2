"""Results of smoke tests: their paths, and how they are judged."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.smoke_result import (
    SmokeResult,
    read_smoke_result,
    require_passed,
    write_smoke_result,
)
from mpt_trt.evaluation.speed import Speed, speed_in_words
from support.results import PASSED

FAILED = replace(PASSED, distance=replace(PASSED.distance, error=1.0))


@pytest.mark.parametrize("result", [PASSED, FAILED])
def test_results_come_back(result: SmokeResult, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    write_smoke_result(result, output)
    assert read_smoke_result(output) == result
    stored = json.loads(output.read_text())
    assert stored["passed"] is result.passed is (result is PASSED)
    assert stored["allowed_error"] == pytest.approx(1.2 * 0.1 + 4 * 0.001)


def test_the_message_names_the_key() -> None:
    require_passed(PASSED, Path("r.json"), "--")
    both = replace(FAILED, distance=replace(FAILED.distance, top1=0.5))
    with pytest.raises(MptTrtError, match="engine: too far from the float32 ref") as caught:
        require_passed(both, Path("r.json"), "variants.v.tolerance.")
    for key in ("error_factor", "min_top1"):
        assert f"; variants.v.tolerance.{key} allows more" in str(caught.value)
    assert str(caught.value).endswith("; see r.json")


def test_speeds_are_medians_with_their_range() -> None:
    speed = PASSED.speed
    assert (speed.prefill_tokens_per_s, speed.prefill_range) == (2.0, (1.0, 3.0))
    assert (speed.decode_tokens_per_s, speed.decode_range, speed.rounds) == (5.0, (4.0, 6.0), 3)
    words = "5 [4 to 6] tokens/s (prompt: 2 [1 to 3] tokens/s), median and range of 3 rounds"
    assert speed_in_words(speed) == words
    once = Speed.of_rounds([2610.4], [133.2])
    assert speed_in_words(once) == "133 tokens/s (prompt: 2,610 tokens/s), 1 round"


def test_a_link_stays(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "result.json")
    write_smoke_result(FAILED, link)
    assert link.is_symlink() and read_smoke_result(tmp_path / "result.json") == FAILED


def test_a_device_or_pipe_stays(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    for output in (Path("/dev/null"), pipe):
        write_smoke_result(FAILED, output)
    reader.join(10)
    assert '"passed": false' in read[0]
    assert Path("/dev/null").is_char_device() and pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_inputs_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("kept")
    with pytest.raises(MptTrtError, match="not replaced, because it is read from"):
        write_smoke_result(FAILED, path, [path])
    assert path.read_text() == "kept"
