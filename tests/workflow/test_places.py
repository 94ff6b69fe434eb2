"""The workflow from anywhere: other folders, links, spaces and braces, other workflows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from support.workflow import SMALL, Workflow

SMOKE_TEST = "smoke_tests/toy/fp16/1-gpu.json"
CHAIN = ["convert_checkpoint", "make_networks", "build_rank", "assemble_engine", "smoke_test"]
CHAIN += ["check_smoke_test"]
PROMPT = "{x} {{y}} {} {wildcards.model}"
MODULE = """
module mpt_trt:
    snakefile: "{checkout}/Snakefile"
    config: {{"models": {{"toy": {{"source": "model"}}}}, "variants": {{"fp16": {small}}}}}


use rule * from mpt_trt as mpt_*


rule mine:
    input: "ft_ckpts/toy/fp16/1-gpu"
    output: "mine.txt"
    shell: "ls {{input}} >{{output}}"
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Workflow.create(tmp_path_factory.mktemp("places") / "my checkout").folder


@pytest.fixture(scope="module")
def elsewhere(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """A working directory with its own model and configuration, made up to a smoke test."""
    folder = tmp_path_factory.mktemp("places") / "my {work} {}"
    shutil.copytree(checkout / "model", folder / "my {} model")
    work = Workflow(folder, snakefile=checkout / "Snakefile")
    work.configure()
    config = folder / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["models"]["toy"]["source"] = "my {} model"
    content["smoke_test"]["prompt"] = PROMPT
    config.write_text(yaml.safe_dump(content))
    jobs = work.make("--", SMOKE_TEST)
    assert jobs == [f"{rule} fp16" for rule in CHAIN]
    return work


def test_braces_in_the_prompt_are_text(elsewhere: Workflow) -> None:
    result = json.loads((elsewhere.folder / SMOKE_TEST).read_text())
    assert result["prompt"] == PROMPT
    planned = elsewhere.run("-n", "-p", "--", "build/trtllm_prompts/toy.json")
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert f"--prompt '{PROMPT}'" in planned.stdout + planned.stderr


def test_artifacts_are_in_the_working_directory(checkout: Path, elsewhere: Workflow) -> None:
    made = {path.name for path in elsewhere.folder.iterdir()}
    assert {"ft_ckpts", "build", "trt_engines", "smoke_tests", "logs"} <= made
    assert not (checkout / "ft_ckpts").exists() and not (checkout / ".snakemake").exists()


def test_a_working_directory_without_room_for_records(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / ".snakemake").touch()
    work = Workflow(tmp_path, snakefile=checkout / "Snakefile")
    assert work.last_line("-n", "--", SMOKE_TEST) == (
        f"error: {tmp_path}/.snakemake: File exists; Snakemake keeps its records there, also of a "
        "dry run: choose a writable folder with --directory"
    )


def test_another_way_to_the_checkout_repeats_nothing(
    checkout: Path, elsewhere: Workflow, tmp_path: Path
) -> None:
    assert elsewhere.planned("--", SMOKE_TEST) == []
    link = tmp_path / "link"
    link.symlink_to(checkout)
    assert replace(elsewhere, snakefile=link / "Snakefile").planned("--", SMOKE_TEST) == []
    moved = Path(shutil.copytree(checkout, tmp_path / "moved", symlinks=True))
    assert replace(elsewhere, snakefile=moved / "Snakefile").planned("--", SMOKE_TEST) == []
    from_checkout = Workflow(checkout)
    options = ("--directory", str(elsewhere.folder), "--", SMOKE_TEST)
    assert from_checkout.planned(*options) == []


def test_the_configuration_that_ships_is_used_where_there_is_none(
    checkout: Path, tmp_path: Path
) -> None:
    """Relative paths of that configuration refer to the repository."""
    work = Workflow(tmp_path, snakefile=checkout / "Snakefile")
    result = work.run("--dry-run", "--", SMOKE_TEST, "quantized/toy/fp8/mpt_tp1_rank0.npz")
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert f"input: {checkout}/model," in output
    assert f"{checkout}/model/config.json" in output
    assert f"{checkout}/calibration.txt" in output


def test_as_a_module_of_another_workflow(checkout: Path, tmp_path: Path) -> None:
    shutil.copytree(checkout / "model", tmp_path / "model")
    (tmp_path / "Snakefile").write_text(MODULE.format(checkout=checkout, small=SMALL))
    work = Workflow(tmp_path)
    assert work.make("--", "mine.txt") == ["mpt_convert_checkpoint fp16", "mine"]
    assert "config.ini" in (tmp_path / "mine.txt").read_text()
    assert work.planned("--", SMOKE_TEST) == [f"mpt_{rule} fp16" for rule in CHAIN[1:]]
    listed = work.run("--list")
    assert "mpt_smoke_test (Run an engine on a prompt" in listed.stdout + listed.stderr


def test_values_of_the_command_line(elsewhere: Workflow) -> None:
    config = yaml.safe_load((elsewhere.folder / "config.yaml").read_text())
    limit = config["variants"]["fp16"]["max_batch_size"]
    same = f"variants={{fp16: {{max_batch_size: {limit}, gather_all_token_logits: false}}}}"
    assert elsewhere.planned("--config", same, "--", SMOKE_TEST) == []
    other = f"variants={{fp16: {{max_batch_size: {limit - 1}}}}}"
    assert elsewhere.planned("--config", other, "--", SMOKE_TEST)[0] == "make_networks fp16"
    wrong = elsewhere.run("-n", "--config", "variants={fp16: {max_batch_size: many}}", "--", "x")
    message = "--config: variants.fp16.max_batch_size = 'many': 'many' is not of type 'integer'"
    assert message in wrong.stdout + wrong.stderr


@pytest.mark.parametrize("source", ["https://huggingface.co/mosaicml/mpt-7b", "~/no such folder"])
def test_sources_that_are_none(source: str, elsewhere: Workflow) -> None:
    config = f"models={{wrong: {{source: '{source}'}}}}"
    result = elsewhere.run("-n", "--config", config, "--", "ft_ckpts/wrong/fp16/1-gpu")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    if source.startswith("~"):
        assert f"no such folder: {Path.home()}/no such folder" in output
    else:
        assert "models.wrong.source = https://huggingface.co/mosaicml/mpt-7b: expected" in output
        assert "write mosaicml/mpt-7b" in output
