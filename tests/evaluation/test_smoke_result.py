"""Places of smoke tests' results."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from mpt_trt.engines.spec import BuilderInfo
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.distance import Distance, Tolerance
from mpt_trt.evaluation.smoke_result import SmokeResult, read_smoke_result, write_smoke_result
from mpt_trt.evaluation.speed import Speed

PASSED = SmokeResult(
    engine_dir="engine",
    engines=("rank0.engine",),
    builder=BuilderInfo("tensorrt", "10", ("8.9",)),
    ranks=1,
    runtime="ONNX Runtime",
    fallback_reason=None,
    prompt="to",
    text=" be",
    tokens=(1, 2),
    prompt_len=1,
    speed=Speed(1.0, 1.0),
    reference="PyTorch",
    distance=Distance(0.0, 0.0, 1.0, 2),
    tolerance=Tolerance(0.1, 0.1, 0.9),
)
REJECTED = replace(PASSED, distance=Distance(1.0, 0.0, 1.0, 2))


def test_each_replaces_the_other(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    for _ in range(2):
        write_smoke_result(PASSED, output)
        assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
        assert read_smoke_result(output) == PASSED
        with pytest.raises(MptTrtError, match=f"^engine: too far .*; see {output}.rejected$"):
            write_smoke_result(REJECTED, output)
        assert [path.name for path in tmp_path.iterdir()] == ["result.json.rejected"]


def test_a_link_stays_and_leads_to_no_old_result(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "result.json")
    write_smoke_result(PASSED, link)
    with pytest.raises(MptTrtError, match="too far"):
        write_smoke_result(REJECTED, link)
    assert link.is_symlink() and not link.exists()


@pytest.mark.parametrize("result", [PASSED, REJECTED])
def test_a_device_or_pipe_stays(tmp_path: Path, result: SmokeResult) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    for output in (Path("/dev/null"), pipe):
        if result is PASSED:
            write_smoke_result(result, output)
        else:
            with pytest.raises(MptTrtError, match=f"see {output}$"):
                write_smoke_result(result, output)
    reader.join(10)
    assert f'"passed": {str(result is PASSED).lower()}' in read[0]
    assert Path("/dev/null").is_char_device() and pipe.is_fifo()
    assert not Path("/dev/null.rejected").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_inputs_are_kept(tmp_path: Path) -> None:
    for name in ("result.json", "result.json.rejected"):
        path = tmp_path / name
        path.write_text("kept")
        with pytest.raises(MptTrtError, match="not replaced, because it is read from"):
            write_smoke_result(REJECTED, tmp_path / "result.json", [path])
        assert path.read_text() == "kept"
        path.unlink()
