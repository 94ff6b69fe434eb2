"""Files of a checkpoint folder in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

from mpt_trt.checkpoint.foreign import require_content, require_plain_checkpoint
from mpt_trt.checkpoint.other_weights import describe_other_weights
from mpt_trt.checkpoint.tokenizer_files import TOKENIZER_FILES
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json
from mpt_trt.system.json_text import shown

# In order of preference; an index stands for its shards.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDEX_SUFFIX = ".index.json"
# Checkpoints of trainers, and other files next to them.
TRAINER_SUFFIXES = (".pt", ".pth", ".ckpt")
NOT_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args")


def checkpoint_files(folder: Path) -> list[Path]:
    """Lists the files that are read: configuration, tokenizer, weights and their index.

    Raises MptTrtError when the folder or its weights are missing.
    """
    if not folder.is_dir():
        raise MptTrtError(f"no such folder: {folder}; give the folder of a checkpoint")
    require_plain_checkpoint(folder)
    source = _weight_source(folder)
    indexed = [source] if source.name.endswith(INDEX_SUFFIX) else []
    optional = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return [*optional, *indexed, *weight_files(folder)]


def weight_files(folder: Path) -> list[Path]:
    """Lists the files that hold the weights of a checkpoint folder.

    Raises MptTrtError when there are none, or when an index names a missing file.
    """
    source = _weight_source(folder)
    require_content(source)
    files = _indexed_files(source) if source.name.endswith(INDEX_SUFFIX) else [source]
    for path in files:
        require_content(path)
    return files


def file_of_tensor(folder: Path) -> dict[str, str]:
    """File names by tensor, from the index of the shards; {} for weights in one file."""
    source = _weight_source(folder)
    if not source.name.endswith(INDEX_SUFFIX):
        return {}
    weight_map = read_json(source).get("weight_map")
    return weight_map if isinstance(weight_map, dict) else {}


def _weight_source(folder: Path) -> Path:
    """The weight file, or the index of the shards."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    for name in WEIGHT_FILES:
        require_content(folder / name)  # a dangling link is not a file
    if trainers := _trainer_checkpoints(folder):
        return trainers[0]
    raise _no_weights(folder)


def _trainer_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint of a trainer, such as Composer's `ep1-ba100-rank0.pt`, if there is one."""
    paths = {
        path.resolve(): path
        for path in sorted(folder.iterdir(), reverse=True)
        if path.suffix in TRAINER_SUFFIXES and not path.name.startswith(NOT_WEIGHTS)
    }
    chosen = sorted(paths.values())
    if len(chosen) > 1:
        names = ", ".join(path.name for path in chosen[:4])
        raise MptTrtError(f"{folder}: several checkpoints of a trainer ({names}); leave one there")
    return chosen


def _no_weights(folder: Path) -> MptTrtError:
    if shards := sorted([*folder.glob("model-*-of-*.safetensors"), *folder.glob("*-of-*.bin")]):
        index = f"{shards[0].name.split('-')[0]}{shards[0].suffix}{INDEX_SUFFIX}"
        return MptTrtError(
            f"{folder}: shards ({shards[0].name}, ...) without their index; download {index} from "
            "their source"
        )
    if next(folder.glob("*.distcp"), None):
        return MptTrtError(
            f"{folder}: a distributed checkpoint (.distcp); convert it to one file with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    usual = f"one of {', '.join(WEIGHT_FILES)} is needed"
    remedy = describe_other_weights(folder, NOT_WEIGHTS) or usual
    return MptTrtError(f"{folder}: no weights found; {remedy}")


# Longer names are none on any file system.
MOST_CHARACTERS = 255


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MptTrtError(f"{index}: field weight_map is missing; download the index again")
    for tensor, name in weight_map.items():
        # "" is printable.
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or not 0 < len(name) <= MOST_CHARACTERS
        ):
            raise MptTrtError(f"{index}: weight_map.{tensor} = {shown(name)}: not a file name")
    tensor_of = {name: tensor for tensor, name in weight_map.items()}
    for name, tensor in sorted(tensor_of.items()):
        if Path(name).name != name:
            raise MptTrtError(
                f"{index}: weight_map puts {tensor} into {name!r}, outside the index's own folder"
            )
        require_content(index.parent / name)
        if not (index.parent / name).is_file():
            raise MptTrtError(
                f"{index.parent / name}: shard is missing (it holds {tensor}); download it, or run "
                "again online"
            )
    return [index.parent / name for name in sorted(tensor_of)]
