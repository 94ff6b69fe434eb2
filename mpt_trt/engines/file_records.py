"""Records of files: size and content hash, which descriptions of folders keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import CONTENT_HASH
from mpt_trt.system.inner_names import inner_path
from mpt_trt.system.json_text import shown
from mpt_trt.system.verified_files import require_recorded


@dataclass(frozen=True)
class FileRecord:
    """Size and content hash of a file."""

    bytes: int
    hash: str

    def __post_init__(self) -> None:
        if self.bytes < 0:
            raise ValueError(f"bytes = {self.bytes}: at least 0 is expected")
        if not CONTENT_HASH.fullmatch(self.hash):
            raise ValueError(f"hash = {shown(self.hash)}: xxh3: and 32 hexadecimal digits expected")


def hashes_of(files: Mapping[str, FileRecord]) -> dict[str, str]:
    """The content hashes of files, by name."""
    return {name: record.hash for name, record in files.items()}


def record_files(folder: Path, hashes: dict[str, str]) -> dict[str, dict]:
    """Makes a FileRecord, as JSON, for each path in the folder."""
    return {
        name: asdict(FileRecord((folder / name).stat().st_size, content))
        for name, content in hashes.items()
    }


def require_file(name: str, size: int, description: Path, remedy: str) -> None:
    """Raises MptTrtError when a file does not have the size that its description records."""
    path = inner_path(description.parent, name, description)
    if not path.is_file():
        raise MptTrtError(f"{path}: missing, though {description.name} names it; {remedy}")
    if (actual := path.stat().st_size) != size:
        raise MptTrtError(
            f"{path}: has {actual} bytes, but {description.name} records {size}; {remedy}"
        )


def require_files(
    files: dict[str, FileRecord], description: Path, remedy: str, is_trusted: bool
) -> None:
    """Raises MptTrtError when a file next to `description` is missing or differs from its record.

    remedy: for error messages. is_trusted: only sizes are compared, not hashes.
    """
    for name, record in files.items():
        require_file(name, record.bytes, description, remedy)
    if not is_trusted:
        require_recorded(description.parent, hashes_of(files), description, remedy)
