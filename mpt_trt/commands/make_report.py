"""Write a page that compares a model's engines, from their quality and smoke test results."""

from __future__ import annotations

import argparse

from mpt_trt.errors import MptTrtError
from mpt_trt.report.page import TEMPLATE, read_entry, write_report


def run(options: argparse.Namespace) -> None:
    engines = (options.variants, options.quality, options.smoke_tests)
    if len(set(map(len, engines))) > 1:
        counts = ", ".join(str(len(values)) for values in engines)
        raise MptTrtError(
            f"--variants, --quality and --smoke_tests have {counts} values; "
            "give one of each per engine"
        )
    entries = [read_entry(*engine) for engine in zip(*engines, strict=True)]
    template, output = options.template or TEMPLATE, options.output
    inputs = (*options.quality, *options.smoke_tests)
    write_report(options.model, entries, template, output, options.items_dir, inputs)
