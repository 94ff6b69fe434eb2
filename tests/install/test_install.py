"""`pip install .` and `pip install -e .` in fresh environments; `make test-install` runs these.

Dependencies are not installed: a fresh environment sees those of the Python that runs the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from support.paths import REPOSITORY

pytestmark = pytest.mark.install

# Files of the repository that a build needs.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "mpt_trt")
PSF_LICENSE = Path("resources", "mpt-demo", "LICENSE.txt")

# Extras that nobody gets unasked: pip compiles llama.cpp, and lm-eval brings 390 MB. Not pinned.
UNASKED_EXTRAS = ("frontier", "lm_eval")
USE = """
import importlib, pkgutil
from importlib import metadata
from pathlib import Path
import mpt_trt
from mpt_trt.cli.calibration_options import TEXT
from mpt_trt.report.page import TEMPLATE
from mpt_trt.workflow.settings import parse_settings

for module in pkgutil.walk_packages(mpt_trt.__path__, "mpt_trt."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name not in UNASKED:
            raise
parse_settings({})
assert TEXT.read_text() and TEMPLATE.read_text()
folder = Path(mpt_trt.__file__).parent
assert (folder / "py.typed").is_file()
assert metadata.version("mpt-trt") == mpt_trt.__version__
print(folder)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, in which builds leave their files."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / name, ignore=ignored)
        else:
            shutil.copyfile(path, folder / name)
    (folder / PSF_LICENSE).parent.mkdir(parents=True)
    shutil.copyfile(REPOSITORY / PSF_LICENSE, folder / PSF_LICENSE)
    return folder


def python_with(installed: Path, folder: Path, *options: str) -> Path:
    """The Python of a fresh environment in `folder` that has `installed`, and our dependencies."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True
    ).strip()
    ours = sysconfig.get_paths()["purelib"]
    (Path(site) / "dependencies.pth").write_text(f"{ours}\n")
    pip = [sys.executable, "-m", "pip", f"--python={python}", "--disable-pip-version-check"]
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, *install, *options, installed], check=True)
    return python


def use(python: Path, outside: Path) -> Path:
    """Uses the package outside the checkout; returns the folder that it was imported from."""
    # Modules of these extras' packages.
    command = [python, "-c", f"UNASKED = ('gguf', 'llama_cpp', 'lm_eval')\n{USE}"]
    return Path(subprocess.check_output(command, text=True, cwd=outside).strip())


def files_of(package: Path) -> set[Path]:
    """Code and data, which a build must not forget."""
    files = (path for path in package.rglob("*") if path.is_file())
    return {path.relative_to(package) for path in files if path.suffix != ".pyc"}


def test_installed(sources: Path, tmp_path: Path) -> None:
    python = python_with(sources, tmp_path / "environment")
    assert use(python, tmp_path).is_relative_to(tmp_path / "environment")
    site = use(python, tmp_path).parent
    assert files_of(site / "mpt_trt") == files_of(sources / "mpt_trt")
    assert not [name for name in ("tests", "tools", "benchmarks") if (site / name).exists()]
    licenses = {path.name for path in site.glob("mpt_trt-*.dist-info/licenses/**/*")}
    assert {"LICENSE", "NOTICE", "LICENSE.txt"} <= licenses
    assert not (sources / "build").exists()  # which belongs to the workflow


def test_installed_in_place(sources: Path, tmp_path: Path) -> None:
    python = python_with(sources, tmp_path / "environment", "--editable")
    assert use(python, tmp_path) == sources / "mpt_trt"


CORE = """
import argparse, sys
from pathlib import Path

for name in sys.argv[1].split(","):
    sys.modules[name] = None
from mpt_trt.engines.load import load_engine
from mpt_trt.commands import convert_hf_mpt_to_ft, make_networks, show_requirements

convert_hf_mpt_to_ft.run(argparse.Namespace(
    in_file=sys.argv[2], revision="main", out_dir=Path("ft"), tensor_parallelism=1, processes=1,
    storage_type="float16", smoothquant=None, calibrate_kv_cache=False, adapter=None,
    tokenizer_dir=None, calib_text=None, force=False,
))
"""
LOAD = """
import sys

for name in sys.argv[1].split(","):
    sys.modules[name] = None
from mpt_trt import Engine

print(Engine.load(sys.argv[2]).generate(["def read(self"], 2)[0].text)
"""
# Modules that only packages of extras have.
EXTRAS = [
    "cuda", "matplotlib", "modelopt", "mpi4py", "onnxruntime_extensions", "pygments", "requests",
    "snakemake", "tensorrt_rtx", "torch",
]  # fmt: skip
# Modules that a conversion also does without.
MORE = ["httpx", "huggingface_hub", "jinja2", "pynvml", "transformers"]


def test_dependencies_are_enough_to_convert(tmp_path: Path) -> None:
    """Packages of extras are missing here and cannot be imported."""
    model = REPOSITORY / "resources" / "mpt-demo"
    command = [sys.executable, "-c", CORE, ",".join([*EXTRAS, *MORE]), model]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "ft" / "1-gpu" / "manifest.json").is_file()


def test_dependencies_are_enough_to_run_an_engine(demo_engine: Path) -> None:
    command = [sys.executable, "-c", LOAD, ",".join(EXTRAS), demo_engine]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    assert subprocess.check_output(command, text=True, env=environment) == ", size\n"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert "nvidia-ml-py" in {_name(line) for line in project["dependencies"]}  # pynvml's package


def test_extras_are_what_is_tested() -> None:
    """Each pinned requirement is a dependency or belongs to an extra, and the other way round."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = asked_extras(project)
    del extras["dev"]
    named = {_name(line) for lines in (project["dependencies"], *extras.values()) for line in lines}
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    pinned = {_name(line) for line in lines if re.match(r"\w", line)}
    assert named - {"mpt-trt"} == pinned


def test_pins_satisfy_the_bounds() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *asked_extras(project).values()]
    for line in (line for group in groups for line in group):
        requirement = packaging.Requirement(line)
        if requirement.name != "mpt-trt":
            assert metadata.version(requirement.name) in requirement.specifier, line


def asked_extras(project: dict[str, Any]) -> dict[str, list[str]]:
    extras = project["optional-dependencies"]
    return {name: lines for name, lines in extras.items() if name not in UNASKED_EXTRAS}


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")
