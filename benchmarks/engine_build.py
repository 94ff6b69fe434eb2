"""Ahead-of-time build of an engine without a GPU: time, memory and disk against the weights."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from common import measure, script, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--like", default="bench-1.3b", help="shape (default: %(default)s)")
    parser.add_argument("--dtype", default="float16", help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark-build"))
    arguments = parser.parse_args()
    model_dir, ft = arguments.folder / "checkpoint", arguments.folder / "ft"
    engine_dir = arguments.folder / "engine"
    if not ft.exists():
        shape = ("--like", arguments.like, "--dtype", arguments.dtype)
        measure(script("make_random_checkpoint.py", *shape, "--output_dir", model_dir))
        storage = ("-t", arguments.dtype)
        measure(script("convert_hf_mpt_to_ft.py", "-i", model_dir, "-o", ft, *storage))
        shutil.rmtree(model_dir)
    shutil.rmtree(engine_dir, ignore_errors=True)
    run = measure(script("build.py", "--model_dir", ft / "1-gpu", "--output_dir", engine_dir))
    weights = sum(path.stat().st_size for path in (engine_dir / "weights").iterdir())
    disk = int(subprocess.check_output(["du", "-sb", arguments.folder]).split()[0])
    figures = {
        "shape": arguments.like,
        "dtype": arguments.dtype,
        "weight_bytes": weights,
        "seconds": run.seconds,
        "peak_private_mib": run.peak_private_mib,
        "ratio_private_memory_to_weights": run.peak_private_mib * 2**20 / weights,
        "ratio_disk_to_weights": disk / weights,
    }
    print(
        f"{run.seconds:.0f} s; memory {figures['ratio_private_memory_to_weights']:.2f} x and disk "
        f"{figures['ratio_disk_to_weights']:.2f} x the weights"
    )
    print(write_result(f"engine-build-{arguments.like}-{arguments.dtype}", figures))


if __name__ == "__main__":
    main()
