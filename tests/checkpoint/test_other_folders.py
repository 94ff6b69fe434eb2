"""Folders of another kind than requested: messages, and folders that are found anyway."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mpt_trt.calibration.model_source import model_folder
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.other_folders import describe_folder
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import read_ft_checkpoint


def with_config(folder: Path, content: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))


def ft(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.ini").write_text("[gpt]\n")


def hub_cache(folder: Path) -> None:
    with_config(folder / "snapshots/abc", {"model_type": "mpt"})


MAKE: dict[str, Callable[[Path], None]] = {
    "hugging face": lambda folder: with_config(folder, {"model_type": "mpt"}),
    "engine": lambda folder: with_config(folder, {"format": 3, "ranks": []}),
    "trtllm": lambda folder: with_config(folder, {"architecture": "MPTForCausalLM"}),
    "trtllm engine": lambda folder: with_config(folder, {"pretrained_config": {}}),
    "ft": ft,
    "above ft": lambda folder: ft(folder / "2-gpu"),
    "hub cache": hub_cache,
    "all of the hub cache": lambda folder: hub_cache(folder / "models--acme--mpt"),
    "above hugging face": lambda folder: with_config(folder / "step-9", {"model_type": "mpt"}),
    "empty": lambda folder: folder.mkdir(parents=True),
}
HINTS = {
    "hugging face": "a checkpoint in Hugging Face format, which convert_hf_mpt_to_ft.py converts",
    "engine": "an engine directory, which run.py reads",
    "trtllm": "a TensorRT-LLM checkpoint, which build_trtllm.py reads",
    "trtllm engine": "an engine directory of TensorRT-LLM",
    "ft": "an FT checkpoint, which build.py and quantize.py read",
    "above ft": "a folder that contains 2-gpu; give {folder}/2-gpu",
    "hub cache": "the hub cache; give {folder}/snapshots/abc",
    "all of the hub cache": "a hub cache; give a model's id, such as acme/mpt, and this folder as",
    "above hugging face": "a folder that contains step-9; give {folder}/step-9",
    "empty": "no such file",
}
# By the kind that each of them takes.
READERS: dict[str, Callable[[Path], object]] = {
    "hugging face": read_hf_config,
    "engine": read_manifest,
    "ft": read_ft_checkpoint,
}


@pytest.mark.parametrize("made", MAKE)
@pytest.mark.parametrize("wanted", READERS)
def test_a_folder_of_another_kind_is_named(tmp_path: Path, wanted: str, made: str) -> None:
    if made == wanted:
        return
    folder = tmp_path / "folder"
    MAKE[made](folder)
    with pytest.raises(MptTrtError) as error:
        READERS[wanted](folder)
    assert HINTS[made].format(folder=folder) in str(error.value)
    assert (describe_folder(folder) is None) == (made == "empty")


def test_a_checkpoint_is_found_below_the_folder_above_it(tmp_path: Path) -> None:
    """quantize.py takes what build.py takes."""
    assert model_folder(tmp_path) == tmp_path
    for name in ("16-gpu", "2-gpu", "4-gpu"):
        ft(tmp_path / name)
    assert model_folder(tmp_path) == tmp_path / "2-gpu"
    assert model_folder(tmp_path / "4-gpu") == tmp_path / "4-gpu"
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["blobs", "refs"])
def test_other_parts_of_the_hub_cache_are_named(tmp_path: Path, name: str) -> None:
    hub_cache(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(MptTrtError, match=f"in the hub cache; give a folder in {tmp_path}/snaps"):
        read_hf_config(tmp_path / name)
