"""Write a page that compares a model's engines, from their quality and smoke test results."""

from __future__ import annotations

import argparse

from mpt_trt.errors import MptTrtError
from mpt_trt.proofs.compare import compare
from mpt_trt.proofs.facts import read_all_facts
from mpt_trt.proofs.result import ProofResult, read_measurements
from mpt_trt.report.page import TEMPLATE, read_entry, read_points, write_report


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
    proof = _proof(options)
    others = [point for path in options.llama_cpp for point in read_points(path, entries)]
    inputs = (
        *options.quality,
        *options.smoke_tests,
        *options.facts,
        *options.measured_facts,
        *options.llama_cpp,
    )
    write_report(options.model, entries, template, output, options.items_dir, inputs, proof, others)


def _proof(options: argparse.Namespace) -> ProofResult | None:
    """Compares the engines with --facts, if there are any."""
    if not options.facts:
        return None
    facts = [fact for file in read_all_facts(options.facts) for fact in file.facts]
    return compare(options.model, facts, read_measurements(options.measured_facts))
