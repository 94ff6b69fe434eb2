"""Compare the generation that run_trtllm.py recorded with the float32 reference."""

from __future__ import annotations

import argparse

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.source import checkpoint_folder, tokenizer_folder
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.cli import options as cli_options
from mpt_trt.cli.output_options import input_paths
from mpt_trt.engines.spec import BuilderInfo
from mpt_trt.engines.trtllm.generation_run import read_trtllm_generation
from mpt_trt.evaluation.logits import measure_distance
from mpt_trt.evaluation.reference import reference_logits, reference_name
from mpt_trt.evaluation.smoke_result import SmokeResult, write_smoke_result
from mpt_trt.evaluation.speed import Speed
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
    reference = reference_logits(folder, generation.tokens[:-1], options.adapter).numpy()
    reference = reference[prompt_len - 1 :]
    engines = sorted(path.name for path in options.engine_dir.glob("rank*.engine"))
    result = SmokeResult(
        engine_dir=str(options.engine_dir),
        engines=tuple(engines),
        builder=BuilderInfo("tensorrt_llm", generation.version, (generation.compute_capability,)),
        ranks=len(engines),
        runtime="tensorrt_llm",
        fallback_reason=None,
        prompt=tokenizer.decode(generation.tokens[:prompt_len]),
        text=tokenizer.decode(generation.tokens[prompt_len:]),
        tokens=tuple(generation.tokens),
        prompt_len=prompt_len,
        speed=Speed(generation.prefill_tokens_per_s, generation.decode_tokens_per_s),
        reference=reference_name(folder),
        distance=measure_distance(generation.logits, reference),
        tolerance=cli_options.tolerance(options),
    )
    write_smoke_result(result, options.output, inputs)
