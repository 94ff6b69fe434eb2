"""Opens a model in a Hugging Face folder or an FT checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.source import folder_provenance
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.ft.joined_tensors import FtTensors
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import WeightReader, weights


@dataclass(frozen=True)
class ModelSource:
    """A model on disk. provenance: origin of its weights; {} if unknown."""

    folder: Path
    config: MptConfig
    reader: WeightReader
    provenance: dict[str, Any]


def is_ft_folder(folder: Path) -> bool:
    """Returns whether the folder is a {tp_size}-gpu folder of an FT checkpoint."""
    return (folder / "config.ini").is_file()


def model_folder(folder: Path) -> Path:
    """Finds the {tp_size}-gpu folder of an FT checkpoint if only its parent is named.

    Those for several tensor-parallel sizes contain the same weights.
    """
    inner = [path.parent for path in folder.glob("[0-9]*-gpu/config.ini")]
    is_above = inner and not is_ft_folder(folder) and not (folder / "config.json").exists()
    return min(inner, key=lambda path: (len(path.name), path.name)) if is_above else folder


def open_model(folder: Path, adapter: Path | None = None) -> ModelSource:
    """Opens a folder in Hugging Face format, or a {tp_size}-gpu folder of an FT checkpoint.

    adapter: folder of a LoRA adapter to merge; an FT checkpoint has its own merged already.

    Raises MptTrtError, naming file and field, when the folder does not contain such a model.
    """
    if is_ft_folder(folder):
        if adapter is not None:
            raise MptTrtError(
                f"--adapter {adapter}: {folder} is an FT checkpoint, whose weights are converted "
                "already; give --adapter to the conversion"
            )
        checkpoint = read_ft_checkpoint(folder)
        checkpoint.require_plain()
        provenance = checkpoint.provenance
        return ModelSource(folder, checkpoint.config, FtTensors(checkpoint), provenance)
    config = read_hf_config(folder)
    reader = HfCheckpoint(folder, weights(config), adapter)
    return ModelSource(folder, config, reader, folder_provenance(folder))
