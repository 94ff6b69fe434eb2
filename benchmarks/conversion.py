"""Compares conversion to an FT checkpoint with `cp` of the same bytes, in one run.

Makes a random checkpoint of each source type, then alternates cp and conversion, and compares
medians. The files are in the page cache before the first measured run, if they fit.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
from pathlib import Path

from common import Measured, make_random_checkpoint, measure, script, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", default="bench-1.3b", help="shape (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="blocks (default: the shape's)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 4], help="(default: 1 4)")
    parser.add_argument(
        "--types",
        nargs="+",
        default=["float16"],
        help="storage types, or source:storage where the checkpoint's differs (default: float16)",
    )
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark"))
    arguments = parser.parse_args()
    remove_outputs(arguments.folder)
    figures: dict = {"shape": arguments.like, "runs": {}}
    for types in arguments.types:
        source_type, _, storage_type = types.rpartition(":")
        source = make_checkpoint(arguments, source_type or storage_type)
        for tp in arguments.tp:
            target = arguments.folder / f"{types.replace(':', '-')}-tp{tp}" / "output"
            target.parent.mkdir(parents=True, exist_ok=True)
            found = compare(source, target, storage_type, tp, arguments.repeats)
            figures["runs"][f"{types} tp{tp}"] = found
            print(f"{types} tp{tp}: {found['ratio']:.2f} x cp, {found['peak_private_mib']:.0f} MiB")
    remove_outputs(arguments.folder)
    print(write_result(f"conversion-{arguments.like}", figures))


def remove_outputs(folder: Path) -> None:
    for outputs in folder.glob("*-tp*"):
        shutil.rmtree(outputs)


def make_checkpoint(arguments: argparse.Namespace, dtype: str) -> Path:
    """Makes the random checkpoint of that type, and removes those of other types."""
    folder = arguments.folder / f"checkpoint-{dtype}"
    for other in arguments.folder.glob("checkpoint-*"):
        if other != folder:
            shutil.rmtree(other)
    if not folder.exists():
        make_random_checkpoint(folder, arguments.like, dtype, arguments.layers)
    return folder


def compare(source: Path, target: Path, storage_type: str, tp: int, repeats: int) -> dict:
    """Alternates cp and conversion.

    `ratio` is that of the medians per byte written, because a conversion may write more or fewer
    bytes than cp.
    """
    command = script(
        "convert_hf_mpt_to_ft.py", "-i", source, "-o", target, "-t", storage_type, "-tp", str(tp)
    )
    copies: list[Measured] = []
    conversions: list[Measured] = []
    written = 0
    emptied = (target.with_name(f"emptied-{number}") for number in itertools.count())
    for _ in range(repeats + 1):  # the first round warms the page cache and is dropped
        for runs, words in ((copies, ["cp", "-r", source, target]), (conversions, command)):
            runs.append(measure(words))
            written = _size(target)
            _empty(target, next(emptied))
    copy, conversion = (_median(runs[1:]) for runs in (copies, conversions))
    return {
        "ratio": (conversion / written) / (copy / _size(source)),
        "bytes_read": _size(source),
        "cp_seconds": copy,
        "conversion_seconds": conversion,
        "bytes_written": written,
        "peak_private_mib": max(run.peak_private_mib for run in conversions),
        "all_cp": copies[1:],
        "all_conversions": conversions[1:],
    }


def _empty(folder: Path, new_name: Path) -> None:
    """Frees the content of a folder's files, and moves the folder away.

    Files are not removed, because ext4 looks at all recently removed inodes whenever it makes a
    file, which then takes up to 1 ms instead of 0.02 ms.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, 0)
    folder.rename(new_name)


def _median(runs: list[Measured]) -> float:
    return statistics.median(run.seconds for run in runs)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
