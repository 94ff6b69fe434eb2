"""Notices that a folder made earlier is no longer whole.

Snakemake judges a folder by one time stamp and does not see that a file inside is gone. So every
folder that a rule makes has a seal beside it, an output of the same rule, which lists the folder's
files. The seal of a damaged folder is broken: it gets a time stamp older than anything, and since
an output is older than the inputs, Snakemake does the step again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from mpt_trt.files import write_json

SNAKEMAKE_TIMESTAMP = ".snakemake_timestamp"
# Seconds since 1970. Not 0, which Snakemake takes for "no time stamp".
BROKEN = 1


def seal_path(folder: str) -> str:
    """Where the seal of a folder lies. Wildcards in the name are left as they are."""
    parent, slash, name = folder.rstrip("/").rpartition("/")
    return f"{parent}{slash}.{name}.seal"


def write_seal(folder: Path) -> None:
    """Seals a finished folder: lists every file in it, by folder, with its size in bytes.

    The size of a file with several hard links is null: what it holds was sealed where it was made.
    """
    write_json(Path(seal_path(str(folder))), _content(folder))


def break_if_damaged(folder: Path) -> None:
    """Breaks the seal of a folder in which a file is missing or has another size than sealed.

    Whenever Snakemake plans, it is called for every folder that there is. Sizes take most of the
    time, above all on file systems of a network, where each is asked for by itself.
    """
    if not folder.is_dir() or _is_whole(folder):
        return
    seal = Path(seal_path(str(folder)))
    seal.touch()
    os.utime(seal, (BROKEN, BROKEN))


def _is_whole(folder: Path) -> bool:
    try:
        sealed = json.loads(Path(seal_path(str(folder))).read_text())
        return all(_has(f"{folder}/{name}", files) for name, files in sealed.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _has(folder: str, files: dict[str, int | None]) -> bool:
    """Whether the files are in the folder, in the sizes that are given."""
    sizes = ((name, size) for name, size in files.items() if size is not None)
    return files.keys() <= set(os.listdir(folder)) and all(
        os.stat(f"{folder}/{name}").st_size == size for name, size in sizes
    )


def _content(folder: Path) -> dict[str, dict[str, int | None]]:
    return {
        os.path.relpath(root, folder): {
            name: _size(os.stat(f"{root}/{name}"))
            for name in sorted(names)
            if name != SNAKEMAKE_TIMESTAMP
        }
        for root, _, names in sorted(os.walk(folder))
    }


def _size(file: os.stat_result) -> int | None:
    return file.st_size if file.st_nlink == 1 else None
