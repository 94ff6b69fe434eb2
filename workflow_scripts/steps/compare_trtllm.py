#!/usr/bin/env python3
"""Compares what run_trtllm.py recorded with the float32 reference.

The result is like that of smoke_test.py, over the tokens that were generated.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import options as options
from mpt_trt.cli.console import run_cli


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine_dir", type=Path, required=True, help="the engine directory")
    parser.add_argument(
        "--generation", type=Path, required=True, help="npz file that run_trtllm.py wrote"
    )
    parser.add_argument(
        "--model_dir", required=True, help="hub id or folder of the Hugging Face checkpoint"
    )
    parser.add_argument("--tokenizer_dir", help="likewise (default: that of --model_dir)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    options.add_tolerance(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from mpt_trt.checkpoint import hub
    from mpt_trt.checkpoint.tokenizer import read_tokenizer
    from mpt_trt.engines.trtllm.generation_run import read_recorded_generation
    from mpt_trt.evaluation.distance import measure_distance
    from mpt_trt.evaluation.reference import reference_logits, reference_name
    from mpt_trt.evaluation.smoke_result import write_smoke_result

    folder, _ = hub.local_folder(arguments.model_dir)
    tokenizer_dir = arguments.tokenizer_dir
    tokenizer = read_tokenizer(
        folder if tokenizer_dir is None else hub.tokenizer_folder(tokenizer_dir, "main")
    )
    generation = read_recorded_generation(arguments.generation)
    prompt_len = generation.prompt_len
    reference = reference_logits(folder, generation.tokens[:-1]).numpy()[prompt_len - 1 :]
    engines = sorted(path.name for path in arguments.engine_dir.glob("rank*.engine"))
    facts = {
        "engine_dir": str(arguments.engine_dir),
        "engines": engines,
        "builder": {
            "package": "tensorrt_llm",
            "version": generation.version,
            "compute_capabilities": [generation.compute_capability],
        },
        "ranks": len(engines),
        "runtime": "tensorrt_llm",
        "fallback_reason": None,
        "prompt": tokenizer.decode(generation.tokens[:prompt_len]),
        "text": tokenizer.decode(generation.tokens[prompt_len:]),
        "tokens": generation.tokens,
        "prompt_len": prompt_len,
        "prefill_tokens_per_s": generation.prefill_tokens_per_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
        "reference": reference_name(folder),
    }
    distance = measure_distance(generation.logits, reference)
    write_smoke_result(arguments.output, facts, distance, options.tolerance(arguments))


if __name__ == "__main__":
    run_cli(main)
