"""Runs an engine and compares its logits with the float32 reference."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from mpt_trt.checkpoint import hub
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.cli import options as cli_options
from mpt_trt.engines.load import load_engine
from mpt_trt.evaluation.distance import measure_distance, record_generation
from mpt_trt.evaluation.reference import reference_logits, reference_name
from mpt_trt.evaluation.smoke_result import write_smoke_result


def run(options: argparse.Namespace) -> None:
    folder, _ = hub.local_folder(options.model_dir, options.revision)
    tokenizer_dir = options.tokenizer_dir
    tokenizer = read_tokenizer(
        folder if tokenizer_dir is None else hub.tokenizer_folder(tokenizer_dir, "main")
    )
    engine = load_engine(
        options.engine_dir, options.runtime, options.num_threads, options.activations
    )
    prompt = tokenizer.encode(options.prompt)
    generation = record_generation(engine, prompt, options.max_new_tokens)
    if not engine.is_first_rank:
        return
    reference = reference_logits(folder, generation.tokens[:-1]).numpy()
    distance = measure_distance(generation.logits, reference)
    facts = {
        "engine_dir": str(options.engine_dir),
        "engines": [rank.engine for rank in engine.manifest.ranks],
        "builder": asdict(engine.manifest.builder),
        "ranks": engine.manifest.tp_size,
        "runtime": engine.runtime,
        "fallback_reason": engine.fallback_reason,
        "prompt": options.prompt,
        "text": tokenizer.decode(generation.tokens[generation.prompt_len :]),
        "tokens": generation.tokens,
        "prompt_len": generation.prompt_len,
        "prefill_tokens_per_s": generation.prefill_tokens_per_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
        "reference": reference_name(folder),
    }
    write_smoke_result(options.output, facts, distance, cli_options.tolerance(options))
