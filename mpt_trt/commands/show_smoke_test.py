"""Print the result of a smoke test."""

from __future__ import annotations

import argparse

from mpt_trt.cli.results import show_smoke_result
from mpt_trt.evaluation.smoke_result import read_smoke_result


def run(options: argparse.Namespace) -> None:
    show_smoke_result(read_smoke_result(options.result), options.result)
