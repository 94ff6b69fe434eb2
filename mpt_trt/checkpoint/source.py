"""Finds the folder of a checkpoint or tokenizer whose source is a folder or a hub id.

A source that is not an existing folder is a hub id only if it has the form `owner/name` and `owner`
is not a folder here. A folder that a manifest records is never requested from a hub.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mpt_trt.checkpoint.snapshot import recorded_provenance
from mpt_trt.checkpoint.tokenizer_files import has_tokenizer
from mpt_trt.errors import MptTrtError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*", re.ASCII)

# Folder of the tokenizer in FT checkpoints and engine directories.
TOKENIZER_FOLDER = "tokenizer"


def is_hub_id(source: str) -> bool:
    """Returns whether `source` has the form `owner/name`, and neither it nor `owner` is a path.

    Names without an owner, such as those of the hub's oldest models, count as paths. So does
    everything that starts with `.`, `/` or `~`.
    """
    if HUB_ID.fullmatch(source) is None:
        return False
    return not Path(source).exists() and not Path(source).parent.exists()


def checkpoint_folder(source: str, revision: str = "main") -> tuple[Path, dict[str, str]]:
    """Finds the folder of a checkpoint, and its provenance (for manifests).

    source: a folder, or a hub id whose `revision` is fetched. The provenance of a hub model, or of
    a folder that `link_folder` made, has kind ("hub"), source, revision and commit. That of any
    other folder has kind ("folder") and its absolute path as source.

    Raises MptTrtError when the folder does not exist, or the hub does not provide the files.
    """
    if is_hub_id(source):
        # Importing the hub's client takes longer than converting a small checkpoint.
        from mpt_trt.checkpoint.hub_environment import require_usable_environment

        require_usable_environment()
        from mpt_trt.checkpoint.hub import fetch_checkpoint

        snapshot = fetch_checkpoint(source, revision)
        return snapshot.folder, snapshot.provenance()
    folder = local_folder(source)
    return folder, folder_provenance(folder)


def folder_provenance(folder: Path) -> dict[str, str]:
    """Provenance of a folder's content; see `checkpoint_folder`.

    Raises MptTrtError when the hub cache has lost a file that the folder links to.
    """
    absolute = {"kind": "folder", "source": str(folder.absolute())}
    return recorded_provenance(folder) or absolute


def tokenizer_folder(source: str, revision: str = "main") -> Path:
    """Finds the folder of the tokenizer of `source`, a folder or a hub id.

    The tokenizer of an FT checkpoint or an engine directory is in a folder within it.

    Raises MptTrtError when the folder does not exist, or the hub does not provide the files.
    """
    if is_hub_id(source):
        from mpt_trt.checkpoint.hub_environment import require_usable_environment  # as above

        require_usable_environment()
        from mpt_trt.checkpoint.hub import fetch_tokenizer

        return fetch_tokenizer(source, revision).folder
    folder = local_folder(source)
    recorded_provenance(folder)
    inner = folder / TOKENIZER_FOLDER
    return inner if has_tokenizer(inner) and not has_tokenizer(folder) else folder


def tokenizer_folder_of(made: Path, provenance: dict[str, Any], asked: str | None) -> Path:
    """Finds the tokenizer of an FT checkpoint or engine directory.

    made: an FT checkpoint or engine directory; its own `tokenizer` folder comes first. provenance:
    of the checkpoint, from the manifest of `made`. asked: a folder or hub id to use instead.

    Raises MptTrtError when none of them names the tokenizer's source, or it does not exist.
    """
    if asked is not None:
        return tokenizer_folder(asked)
    if (made / TOKENIZER_FOLDER).is_dir():
        return made / TOKENIZER_FOLDER
    source = provenance.get("source")
    if not isinstance(source, str):
        raise MptTrtError(
            f"{made}: does not record where its checkpoint came from; give --tokenizer_dir"
        )
    # Older manifests have no kind, and only those of hub models have a commit.
    usual = "hub" if "commit" in provenance else "folder"
    if provenance.get("kind", usual) != "hub":
        return _recorded_folder(made, source)
    from mpt_trt.checkpoint.hub import fetch_tokenizer  # as above

    return fetch_tokenizer(source, str(provenance.get("commit", "main"))).folder


def _recorded_folder(made: Path, source: str) -> Path:
    """Finds the folder that a checkpoint was converted from; never asks a hub."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    raise MptTrtError(
        f"no such folder: {source}, from which {made} was made, and no tokenizer travels with it; "
        "give --tokenizer_dir"
    )


def local_folder(source: str) -> Path:
    """Returns the folder `source`, which is not a hub id; `~` is the home folder.

    Raises MptTrtError when it does not exist.
    """
    try:
        folder = Path(source).expanduser()
    except RuntimeError:
        raise MptTrtError(f"no such folder: {source}: this user has no home folder") from None
    if source and folder.is_dir():
        return folder
    if not source:
        raise MptTrtError(
            "the name of the model or tokenizer is empty; give a folder in Hugging Face format or "
            "a hub id (owner/name)"
        )
    if page := re.match(r"https?://[^/]+/([^/]+/[^/?#]+)", source):
        raise MptTrtError(f"{source}: an address, not a hub id; give {page[1]}")
    kind = "not a folder" if folder.exists() else "no such folder"
    raise MptTrtError(
        f"{kind}: {source}; give a folder in Hugging Face format or a hub id (owner/name)"
    )
