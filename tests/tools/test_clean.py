"""`make clean` deletes only what the workflow made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.paths import tool_path

# Like the workflow's: folders and files as outputs, one of them with a long name.
LONG = "-".join(map(str, range(70)))
SNAKEFILE = f"""
rule all:
    input:
        "ft_ckpts/toy/fp16/1-gpu",
        "smoke_tests/toy/fp16/1-gpu.json",
        "quality/{LONG}/{LONG}.json",
        "build/plans/toy/fp16/1-gpu/rank0.engine",

rule plan:
    output: "build/plans/{{name}}/rank0.engine"
    shell: "touch {{output}} {{output}}.json"

rule fetch:
    output: directory("checkpoints/toy")
    log: "logs/fetch/toy.log"
    shell: "mkdir {{output}} && touch {{output}}/source.json {{log}}"

rule convert:
    input: "checkpoints/toy"
    output: directory("ft_ckpts/toy/fp16/1-gpu")
    shell: "mkdir {{output}}"

rule smoke:
    output: "{{kind}}/{{name}}/{{rest}}.json"
    shell: "touch {{output}}"
"""


def run_workflow(folder: Path) -> None:
    (folder / "Snakefile").write_text(SNAKEFILE)
    command = [sys.executable, "-m", "snakemake", "--cores=1", "--quiet"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def clean(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, tool_path("clean.py")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_the_workflow_made_goes_and_all_else_stays(tmp_path: Path) -> None:
    own = {
        "checkpoints/mine/config.json",
        "ft_ckpts/toy/fp16/2-gpu/config.ini",
        "smoke_tests/notes.txt",
        "resources/model.bin",
    }
    for name in own:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    run_workflow(tmp_path)
    (tmp_path / "ft_ckpts/toy/fp16/.1-gpu.partial-host-1").mkdir()
    assert len(names(tmp_path / "quality")) == 1
    result = clean(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert names(tmp_path) == {*own, "Snakefile"}
    assert not (tmp_path / "quality").exists() and not (tmp_path / "checkpoints/toy").exists()
    assert not (tmp_path / "smoke_tests/toy").exists() and not (tmp_path / "build").exists()
    assert "checkpoints/, ft_ckpts/, smoke_tests/" in result.stdout


def test_links_are_deleted_without_what_they_point_to(tmp_path: Path) -> None:
    run_workflow(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/weights.bin").touch()
    (tmp_path / "checkpoints/toy/link").symlink_to(tmp_path / "elsewhere")
    assert clean(tmp_path).stdout == ""
    assert names(tmp_path) == {"Snakefile", "elsewhere/weights.bin"}


def test_a_running_workflow_is_left_alone(tmp_path: Path) -> None:
    run_workflow(tmp_path)
    (tmp_path / ".snakemake/locks").mkdir(exist_ok=True)
    (tmp_path / ".snakemake/locks/0.input.lock").touch()
    before = names(tmp_path)
    result = clean(tmp_path)
    assert result.returncode == 1 and "is locked" in result.stderr
    assert names(tmp_path) == before


def test_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/mine").mkdir(parents=True)
    assert clean(tmp_path).returncode == 0
    assert (tmp_path / "checkpoints/mine").exists()
