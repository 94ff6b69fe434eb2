"""The files of a tokenizer in a folder, without reading it."""

from __future__ import annotations

from pathlib import Path

from mpt_trt.checkpoint.foreign import require_content
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json
from mpt_trt.system.json_text import MOST_BYTES

# Each of these files is enough for a tokenizer.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Files that transformers reads; config.json names the kind of tokenizer if no other file does.
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
# About eight times the largest tokenizer in use.
MOST_TOKENIZER_BYTES = 256 << 20


def has_tokenizer(folder: Path) -> bool:
    """Returns whether the folder contains a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def tokenizer_files(folder: Path) -> list[Path]:
    """Lists the files of the folder's tokenizer; [] if there is no tokenizer.

    Raises MptTrtError when one of them is a git-LFS pointer or damaged JSON.
    """
    if not has_tokenizer(folder):
        return []
    paths = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    for path in paths:
        _require_whole(path)
    return paths


def _require_whole(path: Path) -> None:
    require_content(path)
    if not path.is_file():
        raise MptTrtError(f"{path}: not a file; put the file of that name there, or delete it")
    size = path.stat().st_size
    if size > MOST_TOKENIZER_BYTES:
        raise MptTrtError(
            f"{path}: {size} bytes, and no tokenizer has more than "
            f"{MOST_TOKENIZER_BYTES >> 20} MiB; restore the file from its source"
        )
    # A multilingual tokenizer may be larger than any other JSON file.
    if path.suffix == ".json" and size <= MOST_BYTES:
        read_json(path)
