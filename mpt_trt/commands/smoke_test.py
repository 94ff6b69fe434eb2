"""Run an engine and compare its logits with the float32 reference."""

from __future__ import annotations

import argparse

from mpt_trt.checkpoint.source import checkpoint_folder, tokenizer_folder
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.cli import options as cli_options
from mpt_trt.cli.engines import open_engine
from mpt_trt.cli.output_options import input_paths
from mpt_trt.cli.progress import steps_progress
from mpt_trt.cli.results import finish_smoke_test
from mpt_trt.evaluation.comparison import measure_distance
from mpt_trt.evaluation.recorded_generation import record_generation
from mpt_trt.evaluation.reference import reference_name
from mpt_trt.evaluation.simulated_rounding import Rounding, expected_logits
from mpt_trt.evaluation.smoke_result import SmokeResult
from mpt_trt.quantization.schemes import as_mapping
from mpt_trt.system.progress_lines import say
from mpt_trt.system.replace import require_writable

SPEED_ROUNDS = 3


def run(options: argparse.Namespace) -> None:
    inputs = input_paths(options)
    require_writable(options.output, inputs)
    folder, _ = checkpoint_folder(options.model_dir, options.revision)
    tokenizer_dir = options.tokenizer_dir
    tokenizer = read_tokenizer(
        folder if tokenizer_dir is None else tokenizer_folder(tokenizer_dir, "main")
    )
    engine = open_engine(options)
    spec = engine.manifest.spec
    tokenizer.require_fitting(spec.config.vocab_size)
    prompt = tokenizer.encode(options.prompt)
    if engine.is_first_rank:
        say(f"Generating {options.max_new_tokens} tokens with {engine.runtime}")
    generation = record_generation(engine, prompt, options.max_new_tokens, SPEED_ROUNDS)
    if not engine.is_first_rank:
        return
    rounding = Rounding(spec.dtype, spec.quantization)
    with steps_progress("Computing the reference, block", spec.config.num_layers) as advance:
        expected = expected_logits(
            folder, generation.tokens[:-1], rounding, options.adapter, advance
        )
    result = SmokeResult(
        engine_dir=str(options.engine_dir),
        engines=tuple(rank.engine for rank in engine.manifest.ranks),
        builder=engine.manifest.builder,
        ranks=spec.tp_size,
        dtype=spec.dtype,
        quantization=as_mapping(spec.scheme),
        kv_cache=spec.quantization.kv_cache,
        runtime=engine.runtime,
        fallback_reason=engine.fallback_reason,
        prompt=options.prompt,
        text=tokenizer.decode(generation.tokens[generation.prompt_len :]),
        tokens=tuple(generation.tokens),
        prompt_len=generation.prompt_len,
        speed=generation.speed,
        reference=reference_name(folder),
        distance=measure_distance(generation.logits, expected),
        tolerance=cli_options.tolerance(options),
        head=spec.quantization.head,
    )
    finish_smoke_test(result, options, inputs)
