"""Compares conversion to an FT checkpoint with and without MPT_TRT_FSYNC=1 (waiting for the disk).

Makes a random checkpoint, and alternates both and `cp` with `sync` of the same bytes in one run.
The checkpoint is in the page cache before the first measured run.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

from common import Measured, make_random_checkpoint, measure, script, write_result

# Compared programs and their environments; None: cp, and sync of its files.
WAYS = {"conversion": "0", "synced conversion": "1", "synced cp": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", default="bench-1.3b", help="shape (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="blocks (default: the shape's)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-sync"))
    arguments = parser.parse_args()
    source, target = arguments.folder / "checkpoint", arguments.folder / "output"
    if not source.exists():
        make_random_checkpoint(source, arguments.like, "float16", arguments.layers)
    runs: dict[str, list[Measured]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats + 1):  # the first round is dropped
        for way in WAYS:
            # Unwritten data of earlier runs must not count.
            measure(["sync"])
            runs[way].append(measure(command(way, source, target)))
            shutil.rmtree(target)
    medians = {way: statistics.median(run.seconds for run in runs[way][1:]) for way in WAYS}
    figures = {
        "shape": arguments.like,
        "bytes_read": sum(path.stat().st_size for path in source.iterdir()),
        "ratio": medians["synced conversion"] / medians["conversion"],
        "ratio_to_synced_cp": medians["synced conversion"] / medians["synced cp"],
        "seconds": medians,
        "all": {way: runs[way][1:] for way in WAYS},
    }
    print(f"{figures['ratio']:.2f} x without, {figures['ratio_to_synced_cp']:.2f} x cp and sync")
    print(write_result(f"sync-cost-{arguments.like}", figures))


def command(way: str, source: Path, target: Path) -> list[str | Path]:
    asked = WAYS[way]
    if asked is None:
        return ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', source, target]
    convert = script("convert_hf_mpt_to_ft.py", "-i", source, "-o", target, "-t", "float16")
    return ["env", f"MPT_TRT_FSYNC={asked}", *convert]


if __name__ == "__main__":
    main()
