"""Finds the folder of a checkpoint or tokenizer whose source is a folder or a hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mpt_trt.checkpoint.snapshot import recorded_provenance
from mpt_trt.errors import MptTrtError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_id(source: str) -> bool:
    """Whether `source` is spelt `owner/name` and no local file or folder has that path.

    Names without an owner, which a few of the hub's oldest models have, count as paths.
    """
    return HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def checkpoint_folder(source: str, revision: str = "main") -> tuple[Path, dict[str, str]]:
    """Finds the folder of a checkpoint, and its provenance (for manifests).

    source: a folder, or a hub id, whose `revision` is fetched. The provenance holds source,
    revision and commit; for a folder that `link_folder` did not make, only the path as `source`.

    Raises MptTrtError when there is no such folder, or the hub does not provide the files.
    """
    if is_hub_id(source):
        # The hub's client takes longer to import than small checkpoints take to convert.
        from mpt_trt.checkpoint.hub import fetch_checkpoint

        snapshot = fetch_checkpoint(source, revision)
        return snapshot.folder, snapshot.provenance()
    folder = _local_folder(source)
    return folder, recorded_provenance(folder) or {"source": source}


def tokenizer_folder(source: str, revision: str = "main") -> Path:
    """Finds the folder of the tokenizer of `source`, a folder or a hub id.

    Raises MptTrtError when there is no such folder, or the hub does not provide the files.
    """
    if is_hub_id(source):
        from mpt_trt.checkpoint.hub import fetch_tokenizer  # as above

        return fetch_tokenizer(source, revision).folder
    folder = _local_folder(source)
    recorded_provenance(folder)
    return folder


def tokenizer_folder_of(made: Path, provenance: dict[str, Any], asked: str | None) -> Path:
    """Finds the tokenizer for an artifact that was made from a checkpoint.

    provenance: of the checkpoint, from the manifest of `made`. asked: a folder or hub id to use
    instead, or None.

    Raises MptTrtError when neither names the tokenizer's source, or it is not there.
    """
    recorded = provenance.get("source")
    source = asked or recorded
    if source is None:
        raise MptTrtError(
            f"{made}: does not record where its checkpoint came from; give --tokenizer_dir"
        )
    revision = provenance.get("commit", "main") if source == recorded else "main"
    return tokenizer_folder(source, revision)


def _local_folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        kind = "not a folder" if folder.exists() else "no such folder"
        raise MptTrtError(
            f"{source}: {kind}; give a folder in Hugging Face format or a hub id (owner/name)"
        )
    return folder
