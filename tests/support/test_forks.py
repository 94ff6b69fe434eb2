"""Forked programs, which many tests start, behave like those that Python starts."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.forks.servers import VARIABLE, forked_python
from support.processes import require_ended

pytestmark = pytest.mark.skipif(VARIABLE not in os.environ, reason="there are no servers")


def run(folder: Path, code: str, *arguments: str, **options: object) -> list[object]:
    """Exit status and output of a script that is started by Python, and then by its stand-in.

    The two must be equal; one is returned.
    """
    script = folder / "script.py"
    script.write_text(f"import os, sys\n{code}\n")
    found = []
    for python in (sys.executable, forked_python()):
        ended = subprocess.run(
            [python, str(script), *arguments], capture_output=True, text=True, cwd=folder, **options
        )
        found.append([ended.returncode, ended.stdout, ended.stderr])
    assert found[1] == found[0]
    return found[1]


def is_forked(folder: Path, **options: object) -> bool:
    """Returns whether a script finds a package that it has not imported."""
    script = folder / "probe.py"
    script.write_text("import sys; print('onnx' in sys.modules, 'mpt_trt' in sys.modules)")
    command = [forked_python(), str(script)]
    words = subprocess.check_output(command, text=True, cwd=folder, **options).split()
    assert words[1] == "False"
    return words[0] == "True"


def test_arguments_environment_folder_and_streams(tmp_path: Path) -> None:
    code = "print(sys.argv, os.getcwd(), os.environ['WORD'], sys.stdin.read())"
    code += "\nprint('é', file=sys.stderr); print(__name__, sys.path[:2])"
    environment = os.environ | {"WORD": "a b", "PYTHONPATH": str(tmp_path / "more")}
    status, output, errors = run(tmp_path, code, "x y", "-z", input="typed", env=environment)
    assert (status, errors) == (0, "é\n")
    assert "'x y', '-z'" in str(output) and f"{tmp_path} a b typed" in str(output)
    assert is_forked(tmp_path, env=environment)


def test_a_variable_that_only_the_server_has_is_not_there(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    assert run(tmp_path, f"print({VARIABLE!r} in os.environ)", env=environment)[1] == "False\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit()", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('a message')", 1),
        ("1 / 0", 1),
        ("import atexit; atexit.register(print, 'last'); print('first')", 0),
        ("import threading; threading.Timer(0.1, print, ['thread']).start()", 0),
        ("os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("os.kill(os.getpid(), 2)", -signal.SIGINT),
        ("os._exit(7)", 7),
    ],
)
def test_ends(tmp_path: Path, code: str, status: int) -> None:
    if code == "1 / 0" or "(), 2)" in code:  # tracebacks include what calls the script
        code = f"sys.stderr = open(os.devnull, 'w'); {code}"
    assert run(tmp_path, code)[0] == status


def test_modules_of_the_scripts_folder(tmp_path: Path) -> None:
    """A run sees the files as they are, even if an earlier one saw others."""
    for value in ("1", "22"):
        (tmp_path / "beside.py").write_text(f"VALUE = {value}")
        assert run(tmp_path, "import beside; print(beside.VALUE)")[1] == f"{value}\n"


def test_the_scripts_folder_may_be_left_out(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": "/more"}
    found = run(tmp_path, "print(sys.path[0])", env=environment)
    assert found[1] == "/more\n"
    assert is_forked(tmp_path, env=environment)


def test_the_cores_of_the_process(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))

    def bind() -> None:
        os.sched_setaffinity(0, {core})

    found = run(tmp_path, "print(os.sched_getaffinity(0))", preexec_fn=bind)
    assert found[1] == f"{{{core}}}\n"
    assert is_forked(tmp_path, preexec_fn=bind)


def started(folder: Path) -> tuple[subprocess.Popen, int]:
    """A script that waits, and the process id that it has written."""
    script = folder / "script.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    process = subprocess.Popen([forked_python(), str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert pid != process.pid
    return process, pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_run(tmp_path: Path, number: signal.Signals) -> None:
    process, pid = started(tmp_path)
    with process:
        process.send_signal(number)
        assert process.wait(10) == -number
    require_ended([pid], within_s=10)


def test_runs_do_not_wait_for_each_other(tmp_path: Path) -> None:
    process, pid = started(tmp_path)
    with process:
        begun = time.monotonic()
        assert run(tmp_path, "print(1)")[1] == "1\n"
        assert time.monotonic() - begun < 50
        process.terminate()
    require_ended([pid], within_s=10)


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_HOME", "/nowhere"), ("PYTHONHASHSEED", "1"), ("PMIX_RANK", "0"), ("TZ", "UTC-5")],
)
def test_what_a_fork_would_miss_gets_the_real_python(tmp_path: Path, name: str, value: str) -> None:
    assert is_forked(tmp_path)
    assert not is_forked(tmp_path, env=os.environ | {name: value})


def test_the_hubs_client_reads_the_variables_of_its_run(tmp_path: Path) -> None:
    script = tmp_path / "fetch_checkpoint.py"
    script.write_text(
        "import sys; print('httpx' in sys.modules, 'huggingface_hub' in sys.modules)\n"
        "from huggingface_hub import constants; print(constants.HF_HOME)\n"
    )
    for home in ("/nowhere", "/elsewhere"):
        command, environment = [forked_python(), str(script)], os.environ | {"HF_HOME": home}
        found = subprocess.check_output(command, text=True, env=environment)
        assert found == f"True False\n{home}\n"


def test_limits_of_the_process_get_the_real_python(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    assert not is_forked(tmp_path, preexec_fn=limit)
    assert not is_forked(tmp_path, umask=0o077)
    assert is_forked(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda: os.nice(1),
        lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]),
    ],
)
def test_niceness_and_signals_get_the_real_python(
    tmp_path: Path, change: Callable[[], object]
) -> None:
    assert not is_forked(tmp_path, preexec_fn=change)
    assert is_forked(tmp_path)


def test_closed_streams_get_the_real_python(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(sys.stdin is None and 'onnx' not in sys.modules)")
    shell = f'"{forked_python()}" "{script}" <&-'
    assert subprocess.run(shell, shell=True, check=False).returncode == 1
