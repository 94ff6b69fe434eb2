#!/usr/bin/env python3
"""Delete what the workflow has made in a folder: its outputs, its logs, and Snakemake's records.

Snakemake records each output in `.snakemake`, and nothing else is deleted: your own checkpoints in
`checkpoints/` stay, and so do outputs of tools that you ran by hand. Files that you put into a
folder that the workflow made are deleted with it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# Folders of the workflow's outputs.
FOLDERS = (
    "build",
    "revisions",
    "checkpoints",
    "ft_ckpts",
    "quantized",
    "trtllm_ckpts",
    "trt_engines",
    "smoke_tests",
    "quality",
    "proofs",
    "throughput",
    "reports",
)
# Snakemake's records of finished and of interrupted outputs.
RECORDS = ("metadata", "incomplete")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n    python tools/clean.py --directory my_project",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="working directory (default: this one)"
    )
    folder = parser.parse_args().directory
    with contextlib.suppress(FileNotFoundError):
        if any((folder / ".snakemake" / "locks").iterdir()):
            sys.exit(
                "error: .snakemake is locked: wait for Snakemake to end, or `snakemake --unlock`"
            )
    clean(folder)
    kept = [f"{name}/" for name in FOLDERS if (folder / name).exists()]
    if kept:
        print(f"Kept, because they contain files that the workflow did not make: {', '.join(kept)}")


def clean(folder: Path) -> None:
    """Delete the workflow's outputs below `folder`, then folders that are empty."""
    for output in outputs(folder):
        path = folder / output
        # Also unfinished copies and records of it, and the description of a plan.
        for each in (path, *path.parent.glob(f".{path.name}.*")):
            remove(each)
        if path.suffix == ".engine":
            remove(path.with_name(f"{path.name}.json"))
        for parent in list(path.relative_to(folder).parents)[:-1]:
            with contextlib.suppress(OSError):  # not empty, or gone
                (folder / parent).rmdir()
    for name in ("logs", ".snakemake"):
        remove(folder / name)


def outputs(folder: Path) -> Iterator[Path]:
    """Outputs that Snakemake has recorded, by their paths below `folder`."""
    for kind in RECORDS:
        records = folder / ".snakemake" / kind
        for record in records.rglob("*"):
            # A long name is split into folders whose names start with @.
            parts = record.relative_to(records).parts
            if record.is_dir() or parts[-1].startswith("."):
                continue
            encoded = "".join(part.removeprefix("@") for part in parts)
            output = Path(base64.urlsafe_b64decode(encoded).decode())
            if not output.is_absolute() and ".." not in output.parts and output.parts[0] in FOLDERS:
                yield output


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
