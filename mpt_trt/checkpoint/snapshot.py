"""Files of one commit of a hub model, and a folder of links to them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import hard_link, read_json
from mpt_trt.system.inner_names import require_inner_name
from mpt_trt.system.json_text import shown
from mpt_trt.system.replace import FolderKind, read_mark, replace_directory

COMMIT = re.compile(r"[0-9a-f]{40}")
RECORD = "source.json"
RECORD_FIELDS = ("source", "revision", "commit")


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit in the hub cache.

    source: hub id. revision: as requested. commit: 40 hexadecimal digits. folder: contains the
    files, and possibly files that other programs have downloaded.
    """

    source: str
    revision: str
    commit: str
    folder: Path
    files: tuple[str, ...]

    def provenance(self) -> dict[str, str]:
        """Origin of the files, for manifests."""
        return {
            "kind": "hub",
            "source": self.source,
            "revision": self.revision,
            "commit": self.commit,
        }


def _own_files(folder: Path) -> set[str] | None:
    content = read_mark(folder / RECORD)
    files = content.get("files")
    if not isinstance(files, dict) or not content.keys() >= set(RECORD_FIELDS):
        return None
    return {RECORD, *files}


FETCHED_CHECKPOINT = FolderKind("a fetched checkpoint", _own_files)


def link_folder(snapshot: Snapshot, target: Path, force: bool = False) -> None:
    """Makes `target` a folder of symbolic links to the files of `snapshot`, plus `source.json`.

    If the file system has no symbolic links, they are hard links or copies. `target` is complete or
    absent. force: see `require_replaceable`. Raises MptTrtError when it exists and contains
    something else.
    """
    sizes = {name: (snapshot.folder / name).stat().st_size for name in snapshot.files}
    with replace_directory(target, FETCHED_CHECKPOINT, [snapshot.folder], force) as partial:
        for name in snapshot.files:
            try:
                (partial / name).symlink_to(snapshot.folder / name)
            except PermissionError:
                hard_link(snapshot.folder / name, partial / name)
        record = {**snapshot.provenance(), "files": sizes}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def read_record(path: Path) -> dict[str, str]:
    """Reads source, revision and commit from a JSON file.

    Raises MptTrtError when one of them is missing or malformed.
    """
    content = read_json(path)
    record = {name: content[name] for name in RECORD_FIELDS if isinstance(content.get(name), str)}
    if len(record) < len(RECORD_FIELDS):
        raise MptTrtError(
            f"{path}: fields {', '.join(RECORD_FIELDS)} are expected; delete it and make it again"
        )
    if not COMMIT.fullmatch(record["commit"]):
        raise MptTrtError(
            f"{path}: commit = {shown(record['commit'])}: 40 hexadecimal digits expected"
        )
    return record


def _recorded_names(path: Path, files: object) -> list[str]:
    if not isinstance(files, dict):
        raise MptTrtError(f"{path}: files = {shown(files)}: an object is expected")
    try:
        for name in files:
            require_inner_name(name)
    except ValueError as error:
        raise MptTrtError(f"{path}: {error}; it is damaged or not to be trusted") from None
    return list(files)


def recorded_provenance(folder: Path) -> dict[str, str] | None:
    """Reads the record of `link_folder` in `folder`; None for any other folder.

    Raises MptTrtError when the hub cache has lost a file that the folder links to.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    content = read_json(path)
    if not content.keys() >= {*RECORD_FIELDS, "files"}:
        return None
    for name in _recorded_names(path, content["files"]):
        if not (folder / name).is_file():
            raise MptTrtError(
                f"{folder / name}: the hub cache no longer holds the file that it links to; "
                f"delete {folder} and fetch the checkpoint again"
            )
    return {"kind": "hub", **read_record(path)}
