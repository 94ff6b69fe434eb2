"""The files of a checkpoint folder in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json

# In order of preference; an index represents the shards that it names.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX_SUFFIX = ".index.json"
OTHER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def checkpoint_files(folder: Path) -> list[Path]:
    """Lists the files that are read: configuration, tokenizer, weights and their index.

    Raises MptTrtError when the folder or its weights are missing.
    """
    if not folder.is_dir():
        raise MptTrtError(f"{folder}: no such folder; models.*.source names a hub id or a folder")
    source = _weight_source(folder)
    indexed = [source] if source.name.endswith(INDEX_SUFFIX) else []
    optional = [folder / name for name in OTHER_FILES if (folder / name).is_file()]
    return [*optional, *indexed, *weight_files(folder)]


def weight_files(folder: Path) -> list[Path]:
    """Lists the files that hold the weights of a checkpoint folder.

    Raises MptTrtError when there are none, or when an index names a missing file.
    """
    source = _weight_source(folder)
    return _indexed_files(source) if source.name.endswith(INDEX_SUFFIX) else [source]


def _weight_source(folder: Path) -> Path:
    """The weight file, or the index of the shards."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise MptTrtError(f"{folder}: no weights found; one of {', '.join(WEIGHT_FILES)} is needed")


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MptTrtError(f"{index}: field weight_map is missing; download the index again")
    tensor_of = {str(name): tensor for tensor, name in weight_map.items()}
    for name, tensor in sorted(tensor_of.items()):
        if Path(name).name != name:
            raise MptTrtError(
                f"{index}: weight_map puts {tensor} into {name!r}, outside the index's own folder"
            )
        if not (index.parent / name).is_file():
            raise MptTrtError(
                f"{index.parent / name}: shard is missing (it holds {tensor}); download it, or run "
                "again online"
            )
    return [index.parent / name for name in sorted(tensor_of)]
