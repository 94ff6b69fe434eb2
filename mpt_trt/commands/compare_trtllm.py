"""Compare the generation that run_trtllm.py recorded with the float32 reference."""

from __future__ import annotations

import argparse

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.source import checkpoint_folder, tokenizer_folder
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.cli import options as cli_options
from mpt_trt.cli.output_options import input_paths
from mpt_trt.cli.progress import steps_progress
from mpt_trt.cli.results import finish_smoke_test
from mpt_trt.engines.spec import BuilderInfo
from mpt_trt.engines.trtllm.recorded_generation import read_trtllm_generation
from mpt_trt.evaluation.comparison import measure_distance
from mpt_trt.evaluation.reference import reference_name
from mpt_trt.evaluation.simulated_rounding import Rounding, expected_logits
from mpt_trt.evaluation.smoke_result import SmokeResult
from mpt_trt.evaluation.speed import Speed
from mpt_trt.quantization.schemes import as_mapping
from mpt_trt.system.replace import require_writable


def run(options: argparse.Namespace) -> None:
    inputs = input_paths(options)
    require_writable(options.output, inputs)
    folder, _ = checkpoint_folder(options.model_dir)
    tokenizer_dir = options.tokenizer_dir
    tokenizer = read_tokenizer(
        folder if tokenizer_dir is None else tokenizer_folder(tokenizer_dir, "main")
    ).require_fitting(read_hf_config(folder).vocab_size)
    generation = read_trtllm_generation(options.generation)
    prompt_len = generation.prompt_len
    # TensorRT-LLM returns the logits of the generated tokens.
    rounding = Rounding(options.dtype, cli_options.quantization(options))
    num_layers = read_hf_config(folder).num_layers
    with steps_progress("Computing the reference, block", num_layers) as advance:
        expected = expected_logits(
            folder, generation.tokens[:-1], rounding, options.adapter, advance
        ).after(prompt_len - 1)
    engines = sorted(path.name for path in options.engine_dir.glob("rank*.engine"))
    result = SmokeResult(
        engine_dir=str(options.engine_dir),
        engines=tuple(engines),
        builder=BuilderInfo("tensorrt_llm", generation.version, (generation.compute_capability,)),
        ranks=len(engines),
        dtype=rounding.dtype,
        quantization=as_mapping(rounding.quantization.scheme),
        kv_cache=rounding.quantization.kv_cache,
        runtime="tensorrt_llm",
        fallback_reason=None,
        prompt=tokenizer.decode(generation.tokens[:prompt_len]),
        text=tokenizer.decode(generation.tokens[prompt_len:]),
        tokens=tuple(generation.tokens),
        prompt_len=prompt_len,
        speed=Speed.of_rounds([generation.prefill_tokens_per_s], [generation.decode_tokens_per_s]),
        reference=reference_name(folder),
        distance=measure_distance(generation.logits, expected),
        tolerance=cli_options.tolerance(options),
        head=rounding.quantization.head,
    )
    finish_smoke_test(result, options, inputs)
