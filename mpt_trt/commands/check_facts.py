"""Compare what engines of a model gave with published facts about it."""

from __future__ import annotations

import argparse

from mpt_trt.cli.results import show_proof
from mpt_trt.proofs.compare import compare
from mpt_trt.proofs.facts import facts_of, inputs_of, read_all_facts
from mpt_trt.proofs.result import read_measurements, require_proved, write_proof
from mpt_trt.system.replace import require_writable


def run(options: argparse.Namespace) -> None:
    named = [*options.facts, *options.measured]
    if options.output is not None:
        require_writable(options.output, named)
    files = read_all_facts(options.facts)
    inputs = [*named, *inputs_of(files)]
    if options.output is not None:
        require_writable(options.output, inputs)
    result = compare(options.model, facts_of(files), read_measurements(options.measured))
    show_proof(result)
    require_proved(result)
    if options.output is not None:
        write_proof(result, options.output, inputs)
