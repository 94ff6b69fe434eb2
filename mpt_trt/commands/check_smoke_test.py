"""Print the result of a smoke test and copy it, unless the engine is too far from the reference."""

from __future__ import annotations

import argparse

from mpt_trt.cli.results import show_smoke_result
from mpt_trt.evaluation.smoke_result import read_smoke_result, require_passed
from mpt_trt.system.replace import replace_file


def run(options: argparse.Namespace) -> None:
    result = read_smoke_result(options.measured)
    show_smoke_result(result, options.measured if options.output is None else options.output)
    key = "--" if options.variant is None else f"variants.{options.variant}.tolerance."
    require_passed(result, options.measured, key)
    if options.output is not None:
        with replace_file(options.output, [options.measured]) as partial:
            partial.write_bytes(options.measured.read_bytes())
