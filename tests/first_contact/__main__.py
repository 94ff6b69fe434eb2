"""Runs every case in a separate process, and reports.

python -m first_contact [--only TEXT] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from first_contact.cases import Case, all_cases
from first_contact.report import table, write_report
from first_contact.run_case import Result
from mpt_trt.cli.console import run_cli
from mpt_trt.engines.tensorrt.packages import choose_package
from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpus

RUN_CASE = "first_contact.run_case"
TIME_LIMIT_S = 3600
# Memory of the GPU that other programs may take.
FREE_SHARE = 0.9


def run_alone(case: Case, arguments: list[str], output: Path, module: str = RUN_CASE) -> Result:
    """Runs a case in a process; a process that dies also gives a result."""
    command = [sys.executable, "-m", module, case.name, str(output), *arguments]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        return Result(case.name, case.kind, message=f"no end within {TIME_LIMIT_S} s")
    if output.exists():
        return Result(**json.loads(output.read_text()))
    last = " / ".join(finished.stderr.strip().splitlines()[-3:])
    return Result(case.name, case.kind, message=f"status {finished.returncode}: {last}"[:500])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run only cases whose name contains this text")
    parser.add_argument("--output", type=Path, default=Path("first_contact.json"))
    options = parser.parse_args()
    capabilities = gpus.compute_capabilities()
    if not capabilities:
        raise MptTrtError("no NVIDIA GPU found; make test-tensorrt needs one")
    package = choose_package("auto")
    print(f"{gpus.names()[0]}, compute capability {capabilities[0]}, {package.module}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        gpu_bytes = int(FREE_SHARE * gpus.memory_sizes()[0])
        disk_bytes = shutil.disk_usage(folder).free
        results = []
        for case in all_cases(capabilities[0], gpu_bytes, disk_bytes):
            if options.only in case.name:
                arguments = [capabilities[0], str(gpu_bytes), str(disk_bytes)]
                output = Path(folder) / f"{len(results)}.json"
                results.append(run_alone(case, arguments, output))
                print(f"{case.kind:12} {case.name}: {results[-1].status}", flush=True)
    write_report(results, options.output)
    print(f"\n{table(results)}\n\nattach {options.output} to a bug report")
    if any(result.status != "ok" for result in results):
        raise MptTrtError(f"not everything is as it should be; see {options.output}")


if __name__ == "__main__":
    run_cli(main)
