"""Notices that a folder made earlier is no longer whole.

Snakemake judges a folder by one time stamp and does not see that a file inside is gone. So every
folder that a rule makes has a seal beside it, which lists the folder's files. When they are no
longer there, the seal is broken: the folder's time stamp is set to a time older than anything, and
since an output is older than the inputs, Snakemake does the step again.

Whenever Snakemake plans, all folders that there are are looked at. That takes time, above all on
file systems of a network, where the size of each file is asked for by itself. So a seal does not
have the sizes of files with several hard links: what they hold was sealed where they were made. And
a folder below that has nothing else is known to be whole by its own time stamp, which every file
that comes or goes changes.
"""

# Millions of files: pathlib takes twice the time.
# ruff: noqa: PTH116, PTH208

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from mpt_trt.system.files import write_json

SNAKEMAKE_TIMESTAMP = ".snakemake_timestamp"
# Seconds since 1970. Not 0, which Snakemake takes for "no time stamp".
BROKEN = 1


@dataclass(frozen=True)
class _Level:
    """What lies directly in a folder that is sealed, or in one below.

    changed_ns: when files came to it or went last, in nanoseconds since 1970. names: of linked
    files. sizes: of all others, in bytes.
    """

    changed_ns: int
    names: list[str]
    sizes: dict[str, int]

    @classmethod
    def of(cls, folder: str, names: list[str]) -> _Level:
        found = {name: os.stat(f"{folder}/{name}") for name in sorted(names)}
        return cls(
            changed_ns=os.stat(folder).st_mtime_ns,
            names=[name for name, file in found.items() if file.st_nlink > 1],
            sizes={name: file.st_size for name, file in found.items() if file.st_nlink == 1},
        )

    def is_whole(self, folder: str) -> bool:
        """Raises OSError when a file that has a size, or the folder, is missing."""
        if any(os.stat(f"{folder}/{name}").st_size != size for name, size in self.sizes.items()):
            return False
        if not self.names or os.stat(folder).st_mtime_ns == self.changed_ns:
            return True
        return set(self.names) <= set(os.listdir(folder))


def seal_path(folder: str) -> str:
    """Where the seal of a folder lies. Wildcards in the name are left as they are."""
    parent, slash, name = folder.rstrip("/").rpartition("/")
    return f"{parent}{slash}.{name}.seal"


def write_seal(folder: Path) -> None:
    """Seals a finished folder: lists every file in it."""
    content = {
        os.path.relpath(root, folder): asdict(_Level.of(root, _without_timestamp(names)))
        for root, _, names in sorted(os.walk(folder))
    }
    write_json(Path(seal_path(str(folder))), content)


def break_if_damaged(folder: Path) -> None:
    """Breaks the seal of a folder in which a file is missing or has another size than sealed."""
    if not folder.is_dir() or _is_whole(folder):
        return
    timestamp = folder / SNAKEMAKE_TIMESTAMP
    timestamp.touch()
    os.utime(timestamp, (BROKEN, BROKEN))


def _is_whole(folder: Path) -> bool:
    try:
        sealed = json.loads(Path(seal_path(str(folder))).read_text())
        return all(_Level(**level).is_whole(f"{folder}/{name}") for name, level in sealed.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _without_timestamp(names: list[str]) -> list[str]:
    return [name for name in names if name != SNAKEMAKE_TIMESTAMP]
