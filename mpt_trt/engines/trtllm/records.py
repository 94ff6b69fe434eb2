"""Adds a manifest and a tokenizer to TensorRT-LLM's checkpoints and engine directories.

TensorRT-LLM's formats have no place for several end tokens or the origin of the weights, and it
ignores unknown files. So `manifest.json` records them under the same keys as that of an FT
checkpoint, and the folder `tokenizer` travels with the engine.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import mpt_trt
from mpt_trt.system.files import hard_link, write_json
from mpt_trt.system.inner_names import inner_path
from mpt_trt.system.replace import read_mark

if TYPE_CHECKING:  # TensorRT-LLM's environment lacks what reads FT checkpoints
    from mpt_trt.ft.checkpoint import FtCheckpoint

MANIFEST = "manifest.json"


def write_records(checkpoint: FtCheckpoint, folder: Path) -> None:
    """Adds the records of an FT checkpoint to a TensorRT-LLM checkpoint that is being written."""
    names = checkpoint.tokenizer_files
    for name in names:
        hard_link(checkpoint.folder / name, folder / name)
    content = {
        "mpt_trt_version": mpt_trt.__version__,
        "provenance": checkpoint.provenance,
        "end_ids": list(checkpoint.end_ids),
        "ignored_end_ids": checkpoint.ignored_end_ids,
        "files": checkpoint.hashes(names),
    }
    write_json(folder / MANIFEST, content)


def link_records(checkpoint: Path, folder: Path) -> None:
    """Adds the records of a TensorRT-LLM checkpoint, if it has any, to an engine directory.

    Raises MptTrtError when the manifest is damaged or one of its files is missing.
    """
    for name in sorted(record_files(checkpoint)):
        hard_link(inner_path(checkpoint, name, checkpoint / MANIFEST), folder / name)


def own_files(folder: Path, pattern: str) -> set[str] | None:
    """Names of our files in a folder: records, config.json, and one per rank.

    pattern: name of a rank's file, with `{}` for the rank. None without our manifest, because
    TensorRT-LLM's own tools write folders of the same form.
    """
    is_own = "mpt_trt_version" in read_mark(folder / MANIFEST)
    records = record_files(folder)
    if not (is_own and records and (folder / "config.json").is_file()):
        return None
    name = re.compile(re.escape(pattern).replace(r"\{\}", "[0-9]+"))
    ranks = {path.name for path in folder.iterdir() if name.fullmatch(path.name)}
    return {"config.json"} | ranks | records


def record_files(folder: Path) -> set[str]:
    """Names of the records in a folder; empty without a manifest that lists its files."""
    files = read_mark(folder / MANIFEST).get("files")
    return {MANIFEST, *files} if isinstance(files, dict) else set()
