"""The folder of an FT checkpoint: names of its own files, and which folders count as one."""

from __future__ import annotations

from pathlib import Path

from mpt_trt.system.replace import FolderKind, read_mark

CONFIG = "config.ini"
SECTION = "gpt"
"""Section of config.ini."""
MANIFEST = "manifest.json"


def _own_files(folder: Path) -> set[str] | None:
    content = read_mark(folder / MANIFEST)
    files = content.get("files")
    # Earlier versions recorded the provenance as `source`.
    is_foreign = content.keys().isdisjoint(("provenance", "source"))
    if is_foreign or not isinstance(files, dict) or not (folder / CONFIG).is_file():
        return None
    return {CONFIG, MANIFEST, *files}


FT_CHECKPOINT = FolderKind("an FT checkpoint", _own_files)
