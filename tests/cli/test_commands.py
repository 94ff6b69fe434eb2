"""Scripts and the modules that do their work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mpt_trt.system.code_version import source_files
from support.paths import REPOSITORY, SCRIPTS

COMMANDS = REPOSITORY / "mpt_trt" / "commands"
PATHS = [*sorted(SCRIPTS.glob("*.py")), *sorted(SCRIPTS.glob("steps/*.py"))]


@pytest.fixture(params=PATHS, ids=lambda path: path.name)
def script(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_command_has_its_script() -> None:
    names = {path.name for path in COMMANDS.glob("*.py")} - {"__init__.py"}
    assert names == {path.name for path in PATHS}


def test_a_script_runs_the_command_of_its_name(script: Path) -> None:
    """`source_files` relies on this convention to find the command's module."""
    calls = [
        node
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "run_command"
    ]
    assert [call.args[1].value for call in calls] == [f"mpt_trt.commands.{script.stem}"]
    assert COMMANDS / script.name in source_files(script)


def test_a_command_has_run(script: Path) -> None:
    module = ast.parse((COMMANDS / script.name).read_text())
    (run,) = (n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == "run")
    assert ast.unparse(run.args) == "options: argparse.Namespace"
    assert ast.get_docstring(module) is not None


def test_a_script_imports_at_its_top(script: Path) -> None:
    module = ast.parse(script.read_text())
    imports = [n for n in ast.walk(module) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert all(node in module.body for node in imports)


def test_wrong_options_do_not_wait_for_the_command() -> None:
    script = SCRIPTS / "steps" / "smoke_test.py"
    command = [sys.executable, "-X", "importtime", script, "--no_such_option"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "mpt_trt.cli.console" in result.stderr
    assert "mpt_trt.commands" not in result.stderr
