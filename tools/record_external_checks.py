#!/usr/bin/env python3
"""Run the tests against others' software, and record what they found in docs/recorded.

`make docs` then writes docs/proofs.md. Tests whose packages are missing are not recorded. The
result of a proof is recorded with --proof.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from mpt_trt.cli.console import run_cli
from mpt_trt.cli.parser import tool_parser
from mpt_trt.errors import MptTrtError
from mpt_trt.proofs.result import read_proof, write_proof
from tools.external_checks import RECORDED, Check, Checks, Recorded, read_checks, write_checks


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, "tools/record_external_checks.py --proof proofs/mpt-demo.json")
    parser.add_argument("--proof", type=Path, help="result of a proof to record, too")
    parser.add_argument(
        "--only", nargs="*", metavar="NAME", help="names of the checks to run (default: all)"
    )
    return parser


def main() -> None:
    options = make_parser().parse_args()
    if options.proof is not None:
        proof = read_proof(options.proof)
        write_proof(proof, REPOSITORY / RECORDED / f"proof-{proof.model}.json")
    checks = read_checks(REPOSITORY)
    chosen = [check.name for check in checks.checks] if options.only is None else options.only
    rerun = [run(check) if check.name in chosen else check for check in checks.checks]
    write_checks(Checks(tuple(rerun)), REPOSITORY)


def run(check: Check) -> Check:
    """Runs a check's tests; returns it with what they found, or unchanged if some cannot run."""
    missing = [package for package in check.packages if not _version(package)]
    if not check.tests or missing:
        reason = f"{', '.join(missing)} not installed" if missing else "it has no tests"
        print(f"{check.name}: not run ({reason})")
        return check
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *check.tests],
            cwd=REPOSITORY,
            env=os.environ,
            check=False,
        )
        if not report.is_file():
            raise MptTrtError(f"{check.name}: pytest wrote no report; run its tests by hand")
        [suite] = ET.parse(report).getroot().iter("testsuite")
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    found = f"{passed} passed, {failed} failed" + f", {counts['skipped']} skipped" * bool(
        counts["skipped"]
    )
    versions = ", ".join(f"{package} {_version(package)}" for package in check.packages)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return replace(check, recorded=Recorded(today, found, versions))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    run_cli(main)
