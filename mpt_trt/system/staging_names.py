"""Names of the staging folders in which outputs are made, next to their places."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import xxhash

LONGEST_SHOWN_NAME = 100


def stagings_of(target: Path, host: str) -> list[Path]:
    """Lists the staging folders of a target, of all processes. host: a pattern."""
    pattern = glob.escape(shown_name(target)) + f".partial-{host}-*"
    return sorted(target.parent.glob(f".{pattern}"))


def prefix_of(target: Path) -> str:
    """Prefix of the names of this machine's staging folders of a target."""
    return f".{shown_name(target)}.partial-{os.uname().nodename}-"


def shown_name(target: Path) -> str:
    """The target's name, shortened to leave room for the rest of a staging name."""
    name = os.fsencode(target.name)
    if len(name) <= LONGEST_SHOWN_NAME:
        return target.name
    digest = xxhash.xxh3_64_hexdigest(name)
    return f"{os.fsdecode(name[: LONGEST_SHOWN_NAME - 20])}~{digest}"
