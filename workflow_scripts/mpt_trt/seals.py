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
    """Seals a finished folder: lists every file in it with its size in bytes."""
    write_json(Path(seal_path(str(folder))), _sizes(folder))


def break_if_damaged(folder: Path) -> None:
    """Breaks the seal of a folder in which a file is missing or has another size than sealed."""
    if not folder.is_dir() or _is_whole(folder):
        return
    seal = Path(seal_path(str(folder)))
    seal.touch()
    os.utime(seal, (BROKEN, BROKEN))


def _is_whole(folder: Path) -> bool:
    # Folders of large models have a thousand files, and Snakemake looks at all of them whenever it
    # plans: names relative to an open folder take a third of the time of paths.
    try:
        sealed = json.loads(Path(seal_path(str(folder))).read_text())
        opened = os.open(folder, os.O_RDONLY)
    except (OSError, ValueError):
        return False
    try:
        return all(os.stat(n, dir_fd=opened).st_size == size for n, size in sealed.items())
    except (OSError, AttributeError):
        return False
    finally:
        os.close(opened)


def _sizes(folder: Path) -> dict[str, int]:
    paths = sorted(Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in paths
        if path.name != SNAKEMAKE_TIMESTAMP
    }
