"""Write a page that compares a model's engines, from their quality and smoke test results."""

from __future__ import annotations

import argparse

from mpt_trt.errors import MptTrtError
from mpt_trt.proofs.compare import compare
from mpt_trt.proofs.facts import FactsFile, facts_of, inputs_of, read_all_facts
from mpt_trt.proofs.result import ProofResult, read_measurements
from mpt_trt.report.entries import read_entry, read_points
from mpt_trt.report.page import TEMPLATE, write_report
from mpt_trt.report.throughput_plot import draw_throughput, read_series


def run(options: argparse.Namespace) -> None:
    engines = (options.variants, options.quality, options.smoke_tests)
    if len(set(map(len, engines))) > 1:
        counts = ", ".join(str(len(values)) for values in engines)
        raise MptTrtError(
            f"--variants, --quality and --smoke_tests have {counts} values; "
            "give one of each per engine"
        )
    if len(options.throughput) not in (0, len(options.variants)):
        raise MptTrtError(
            f"--throughput has {len(options.throughput)} values, and --variants "
            f"{len(options.variants)}; give one per engine, or none"
        )
    entries = [read_entry(*engine) for engine in zip(*engines, strict=True)]
    template, output = options.template or TEMPLATE, options.output
    facts = read_all_facts(options.facts)
    proof = _proof(options, facts)
    others = [point for path in options.llama_cpp for point in read_points(path, entries)]
    inputs = (
        *options.quality,
        *options.smoke_tests,
        *inputs_of(facts),
        *options.measured_facts,
        *options.llama_cpp,
        *options.throughput,
    )
    more = []
    if options.throughput:
        series = read_series([entry.label for entry in entries], options.throughput)
        more.append(draw_throughput(series))
    items = options.items_dir
    write_report(options.model, entries, template, output, items, inputs, proof, others, more)


def _proof(options: argparse.Namespace, files: list[FactsFile]) -> ProofResult | None:
    """Compares the engines with the facts in files, if there are any."""
    if not files:
        return None
    return compare(options.model, facts_of(files), read_measurements(options.measured_facts))
