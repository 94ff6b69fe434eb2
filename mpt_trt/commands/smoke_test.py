"""Run an engine and compare its logits with the float32 reference."""

from __future__ import annotations

import argparse

from mpt_trt.checkpoint.source import checkpoint_folder, tokenizer_folder
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.cli import options as cli_options
from mpt_trt.cli.output_options import input_paths
from mpt_trt.engines.load import load_engine
from mpt_trt.evaluation.logits import measure_distance
from mpt_trt.evaluation.recorded_generation import record_generation
from mpt_trt.evaluation.reference import reference_logits, reference_name
from mpt_trt.evaluation.smoke_result import SmokeResult, write_smoke_result
from mpt_trt.system.replace import require_writable


def run(options: argparse.Namespace) -> None:
    inputs = input_paths(options)
    require_writable(options.output, inputs)
    folder, _ = checkpoint_folder(options.model_dir, options.revision)
    tokenizer_dir = options.tokenizer_dir
    tokenizer = read_tokenizer(
        folder if tokenizer_dir is None else tokenizer_folder(tokenizer_dir, "main")
    )
    engine = load_engine(
        options.engine_dir,
        options.runtime,
        options.num_threads,
        options.activations,
        options.trust,
    )
    tokenizer.require_fitting(engine.manifest.spec.config.vocab_size)
    prompt = tokenizer.encode(options.prompt)
    generation = record_generation(engine, prompt, options.max_new_tokens)
    if not engine.is_first_rank:
        return
    reference = reference_logits(folder, generation.tokens[:-1], options.adapter).numpy()
    result = SmokeResult(
        engine_dir=str(options.engine_dir),
        engines=tuple(rank.engine for rank in engine.manifest.ranks),
        builder=engine.manifest.builder,
        ranks=engine.manifest.spec.tp_size,
        runtime=engine.runtime,
        fallback_reason=engine.fallback_reason,
        prompt=options.prompt,
        text=tokenizer.decode(generation.tokens[generation.prompt_len :]),
        tokens=tuple(generation.tokens),
        prompt_len=generation.prompt_len,
        speed=generation.speed,
        reference=reference_name(folder),
        distance=measure_distance(generation.logits, reference),
        tolerance=cli_options.tolerance(options),
    )
    write_smoke_result(result, options.output, inputs)
