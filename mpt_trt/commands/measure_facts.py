"""Measure on an engine what published facts about its model say."""

from __future__ import annotations

import argparse

from mpt_trt.api.engine import Engine
from mpt_trt.api.text import EngineText
from mpt_trt.cli.engines import open_engine
from mpt_trt.cli.output_options import input_paths
from mpt_trt.cli.results import show_proof
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.measured_engine import describe_engine, peak_memory_of_ranks
from mpt_trt.proofs.compare import compare
from mpt_trt.proofs.facts import fact_hash, inputs_of, read_all_facts
from mpt_trt.proofs.measure import facts_about, measure_facts
from mpt_trt.proofs.result import FactMeasurements, require_proved, write_measurements
from mpt_trt.system.progress_lines import say
from mpt_trt.system.replace import require_writable


def run(options: argparse.Namespace) -> None:
    named = [*input_paths(options), *options.facts]
    require_writable(options.output, named)
    files = read_all_facts(options.facts)
    inputs = [*named, *inputs_of(files)]
    require_writable(options.output, inputs)
    loaded = open_engine(options)
    text = EngineText.read(options.engine_dir, loaded.manifest, options.tokenizer_dir)
    engine = Engine(loaded, text)
    about = [fact for _, fact in facts_about(engine, files)]
    if not about:
        raise MptTrtError(
            f"{options.engine_dir}: none of the facts is about engines of its type "
            f"({loaded.manifest.spec.dtype}) and quantization"
        )
    if loaded.is_first_rank:
        say(f"Measuring {len(about)} facts with {loaded.runtime}")
    measured = measure_facts(engine, options.engine_dir, files)
    peak_memory = peak_memory_of_ranks(loaded)
    if not loaded.is_first_rank:
        return
    result = FactMeasurements(
        **describe_engine(loaded, options.engine_dir, peak_memory),
        measured=measured,
        hashes={fact.name: fact_hash(fact) for fact in about},
    )
    write_measurements(result, options.output, inputs)
    if not options.report_only:
        proof = compare(loaded.manifest.model_name, about, [result])
        show_proof(proof)
        require_proved(proof)
