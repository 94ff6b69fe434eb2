"""Tools and the workflow import nothing slow before they need it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.built import Built
from support.paths import FOLDERS, REPOSITORY, tool_path

# The quickest of them takes a twentieth of a second, the slowest several.
HEAVY = {
    "huggingface_hub", "matplotlib", "modelopt", "numpy", "onnx", "onnxruntime", "safetensors",
    "tensorrt_rtx", "tokenizers", "torch", "transformers",
}  # fmt: skip
TOOLS = [
    path.name
    for folder in FOLDERS
    for path in sorted(folder.glob("*.py"))
    if "__main__" in path.read_text()
]


def imported_by(*command: str | Path) -> set[str]:
    """Top-level modules that a run of Python imports."""
    return {name.partition(".")[0] for name in modules_imported_by(*command)}


def modules_imported_by(*command: str | Path) -> set[str]:
    """Full names of the modules that a run of Python imports."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    lines = (line for line in run.stderr.splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip() for line in lines}


def test_imports_are_seen() -> None:
    assert {"json", "numpy"} <= imported_by("-c", "import json, numpy.linalg")


@pytest.mark.parametrize("tool", TOOLS)
def test_help_imports_nothing_heavy(tool: str) -> None:
    found = imported_by(tool_path(tool), "--help")
    assert "argparse" in found
    assert not found & HEAVY


@pytest.mark.parametrize("tool", ["build.py", "convert_hf_mpt_to_ft.py", "quantize.py", "run.py"])
def test_options_do_not_wait_for_versions_of_packages(tool: str) -> None:
    assert "importlib.metadata" not in modules_imported_by(tool_path(tool), "--help")


def test_a_plain_conversion_leaves_out_what_others_need(built: Built, tmp_path: Path) -> None:
    """Parts for adapters, pickled weights, int8 and text, and readers of FT checkpoints."""
    options = (f"-i={built.hf}", f"-o={tmp_path}", "-t=float16")
    found = modules_imported_by(tool_path("convert_hf_mpt_to_ft.py"), *options)
    assert "mpt_trt.ft.writer" in found
    others = {"checkpoint.adapter", "checkpoint.pickled", "checkpoint.tokenizer", "ft.checkpoint",
              "ft.int8", "quantization.schemes", "workflow.settings"}  # fmt: skip
    assert not found & {f"mpt_trt.{name}" for name in others}
    assert not found & {"hashlib", "importlib.metadata", "random", "tempfile", "yaml", "zipfile"}


def test_planning_imports_nothing_heavy() -> None:
    """Packages that Snakemake's own plugins import, such as NumPy, do not count."""
    plan = ("-m", "snakemake", "--dry-run", "--quiet", "--nolock", "--cores=1")
    found = imported_by(*plan, "reports/mpt-demo.html")
    assert {"snakemake", "mpt_trt"} <= found
    assert not found & (HEAVY - imported_by("-m", "snakemake", "--version"))


def test_reading_a_tokenizer_leaves_pytorch_out() -> None:
    """A process that already has PyTorch gets a transformers that computes."""
    read = (
        "from pathlib import Path; from mpt_trt.checkpoint.tokenizer import read_tokenizer; "
        "print(read_tokenizer(Path('resources/mpt-demo')).encode('hello')); import transformers; "
    )
    without = "import sys; assert not [name for name in sys.modules if name.startswith('torch')]; "
    imported_by("-c", read + without + "import torch; torch.zeros(1)")
    imported_by("-c", "import torch; " + read + "assert transformers.utils.is_torch_available()")


@pytest.mark.parametrize("asked", [None, "active"])
def test_threads_that_wait_leave_the_core_unless_asked_otherwise(asked: str | None) -> None:
    show = "from mpt_trt.cli.console import run_cli; run_cli(lambda: {print_it})"
    assert shown("OMP_WAIT_POLICY", asked, show) == (asked or "passive")


@pytest.mark.parametrize("asked", [None, "0"])
def test_onnx_runtime_reports_nothing_unless_asked_otherwise(asked: str | None) -> None:
    assert shown("ORT_DISABLE_TELEMETRY", asked, "import mpt_trt; {print_it}") == (asked or "1")


def shown(variable: str, asked: str | None, code: str) -> str:
    """Runs `code`; returns the variable that `print_it` prints. asked: its value outside."""
    environment = {k: v for k, v in os.environ.items() if k != variable}
    if asked is not None:
        environment[variable] = asked
    code = "import os; " + code.format(print_it=f"print(os.environ[{variable!r}])")
    command = [sys.executable, "-c", code]
    return subprocess.check_output(command, text=True, cwd=REPOSITORY, env=environment).strip()


def test_only_the_documented_cache_is_left_in_the_users_home(built: Built, tmp_path: Path) -> None:
    """Runs tools that use ONNX Runtime for arithmetic and to run an engine."""
    home = tmp_path / "home"
    home.mkdir()
    # Variables that this process has set must not be inherited.
    kept = {"PATH", "LD_LIBRARY_PATH", "LANG"} & os.environ.keys()
    environment = {name: os.environ[name] for name in kept} | {"HOME": str(home)}
    convert = ["convert_hf_mpt_to_ft.py", f"-i={built.hf}", f"-o={tmp_path / 'ft'}", "-t=bfloat16"]
    run = ["run.py", f"--engine_dir={built.engine}", f"--tokenizer_dir={built.hf}"]
    for script, *options in (convert, [*run, "--max_output_len=2", "--input_text=hello"]):
        command = [sys.executable, tool_path(script), *options]
        subprocess.run(command, check=True, capture_output=True, env=environment)
    files = [path for path in home.rglob("*") if not path.is_dir()]
    assert files == [home / ".cache" / "mpt-trt" / "content_hashes.txt"]
