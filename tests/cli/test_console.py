"""How commands end."""

from __future__ import annotations

import errno
import subprocess
import sys

import numpy as np
import pytest

from mpt_trt.cli.console import run_cli


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype(np.float32)),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_lack_of_memory_is_reported_in_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as raised:
        run_cli(fail)
    assert raised.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory")
    assert message.count("\n") == 1


def test_other_errors_keep_their_traceback() -> None:
    code = "from mpt_trt.cli.console import run_cli\nrun_cli(lambda: 1 / 0)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr
