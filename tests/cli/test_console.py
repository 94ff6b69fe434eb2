"""Exit statuses and messages of commands."""

from __future__ import annotations

import errno
import importlib
import re
import subprocess
import sys
from pathlib import Path

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


SCRIPTS = Path(__file__).parents[2] / "workflow_scripts"


@pytest.mark.parametrize("script", sorted(SCRIPTS.rglob("*.py")), ids=lambda path: path.stem)
def test_a_missing_package_is_reported_in_one_line(script: Path) -> None:
    # Without site, Python finds no installed package.
    ended = subprocess.run([sys.executable, "-S", script], capture_output=True, text=True)
    if ended.returncode == 2:
        assert "error: the following arguments are required: " in ended.stderr
    else:
        assert ended.returncode == 1
        assert re.match(r"error: \S+ has no package \w+; start the tool with", ended.stderr)
        assert ended.stderr.count("\n") == 1


def test_a_missing_module_of_our_own_is_a_bug_and_keeps_its_traceback() -> None:
    def fail() -> None:
        importlib.import_module("mpt_trt.none")

    with pytest.raises(ModuleNotFoundError):
        run_cli(fail)


PRINT = "from mpt_trt.cli.console import run_cli; run_cli(lambda: print('x'))"
HELP = "import sys; sys.argv = ['x', '--help']; import argparse; from mpt_trt.cli import console; "
HELP += "console.run_command(argparse.ArgumentParser, '')"


@pytest.mark.parametrize("code", [PRINT, HELP])
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [
        (">/dev/full", "No space left on device"),
        (">&-", "Bad file descriptor"),
        ("| head -c 0", "Broken pipe"),
        ("2>&- >&-", None),
        ("<&-", None),
    ],
)
def test_output_that_cannot_be_written_is_reported_in_one_line(
    code: str, redirection: str, reason: str | None
) -> None:
    command = f'set -o pipefail; {sys.executable} -c "{code}" {redirection}'
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.returncode == (0 if redirection == "<&-" else 1)
    if reason is None:
        assert ended.stderr == ""
    else:
        expected = f"error: cannot write to the standard output: {reason}; redirect it to a file"
        assert ended.stderr.startswith(expected)
        assert ended.stderr.count("\n") == 1


def test_files_do_not_get_the_descriptors_of_closed_streams() -> None:
    code = "import os, sys; from mpt_trt.cli.console import run_cli; "
    code += "run_cli(lambda: sys.exit(min(os.open('/', 0), 3)))"
    ended = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'])
    assert ended.returncode == 3


def test_an_error_is_not_hidden_by_one_of_the_output() -> None:
    code = "from mpt_trt.cli.console import run_cli; from mpt_trt.errors import MptTrtError\n"
    code += "def main():\n  print('x')\n  raise MptTrtError('the reason')\nrun_cli(main)"
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ended = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (ended.returncode, ended.stderr) == (1, "error: the reason\n")


def test_a_system_error_about_a_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli(lambda: open("/no/such/file"))  # noqa: PTH123, SIM115
    assert capsys.readouterr().err == "error: /no/such/file: No such file or directory\n"


def test_other_errors_keep_their_traceback() -> None:
    code = "from mpt_trt.cli.console import run_cli\nrun_cli(lambda: 1 / 0)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr


def test_a_deleted_current_directory_is_named(tmp_path: Path) -> None:
    code = "from mpt_trt.cli.console import run_cli; run_cli(lambda: print('ran'))"
    gone = tmp_path / "gone"
    gone.mkdir()
    root = Path(__file__).parents[2]
    command = f'rmdir "{gone}"; PYTHONPATH="{root}" {sys.executable} -c "{code}"'
    ended = subprocess.run(["bash", "-c", command], cwd=gone, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.endswith(
        "error: the current directory was deleted; change to one that exists (cd), and run again\n"
    )


@pytest.mark.parametrize(("before", "status"), [("SIG_DFL", 130), ("SIG_IGN", 0)])
def test_a_closed_terminal_interrupts_unless_that_is_ignored(before: str, status: int) -> None:
    code = "import signal; from mpt_trt.cli.console import run_cli; "
    code += f"signal.signal(signal.SIGHUP, signal.{before}); "
    code += "run_cli(lambda: signal.raise_signal(signal.SIGHUP))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == status
    assert ended.stderr == ("interrupted; unfinished outputs were removed\n" if status else "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_interrupts_during_imports_are_no_errors_of_the_import(name: str, tmp_path: Path) -> None:
    """Compiled modules turn exceptions during their initialization into ImportErrors."""
    (tmp_path / "slow_command.py").write_text(
        "import signal\n"
        f"try:\n    signal.raise_signal(signal.{name})\n"
        "except BaseException:\n    raise ImportError('initialization failed') from None\n"
    )
    code = "import argparse, signal, sys; from mpt_trt.cli.console import run_command; "
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    code += f"sys.path.insert(0, {str(tmp_path)!r}); sys.argv[1:] = []; "
    code += "run_command(argparse.ArgumentParser, 'slow_command')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stderr == "interrupted; unfinished outputs were removed\n"
