#!/usr/bin/env python3
"""Runs an engine and compares its logits with the float32 reference.

Writes the result as JSON. When the distance exceeds the tolerance, the result goes to
{output}.rejected instead and the exit status is 1. The other of the two files is removed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import options as options
from mpt_trt.cli.console import run_cli
from mpt_trt.system.process import restart_with_huge_pages
from mpt_trt.workflow.settings import parse_settings


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine_dir", type=Path, required=True, help="the engine directory")
    parser.add_argument(
        "--model_dir", required=True, help="hub id or folder of the Hugging Face checkpoint"
    )
    parser.add_argument("--tokenizer_dir", help="likewise (default: that of --model_dir)")
    parser.add_argument("--revision", default="main", help="on the hub (default: %(default)s)")
    usual = parse_settings({}).smoke_test
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--prompt", default=usual.prompt, help="(default: %(default)s)")
    parser.add_argument(
        "--max_new_tokens", type=int, default=usual.max_new_tokens, help="(default: %(default)s)"
    )
    options.add_tolerance(parser)
    options.add_runtime(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from mpt_trt.checkpoint import hub
    from mpt_trt.checkpoint.tokenizer import read_tokenizer
    from mpt_trt.engines.load import load_engine
    from mpt_trt.evaluation.distance import measure_distance, record_generation
    from mpt_trt.evaluation.reference import reference_logits, reference_name
    from mpt_trt.evaluation.smoke_result import write_smoke_result

    folder, _ = hub.local_folder(arguments.model_dir, arguments.revision)
    tokenizer_dir = arguments.tokenizer_dir
    tokenizer = read_tokenizer(
        folder if tokenizer_dir is None else hub.tokenizer_folder(tokenizer_dir, "main")
    )
    engine = load_engine(
        arguments.engine_dir, arguments.runtime, arguments.num_threads, arguments.activations
    )
    prompt = tokenizer.encode(arguments.prompt)
    generation = record_generation(engine, prompt, arguments.max_new_tokens)
    if not engine.is_first_rank:
        return
    reference = reference_logits(folder, generation.tokens[:-1]).numpy()
    distance = measure_distance(generation.logits, reference)
    facts = {
        "engine_dir": str(arguments.engine_dir),
        "engines": [rank.engine for rank in engine.manifest.ranks],
        "builder": asdict(engine.manifest.builder),
        "ranks": engine.manifest.tp_size,
        "runtime": engine.runtime,
        "fallback_reason": engine.fallback_reason,
        "prompt": arguments.prompt,
        "text": tokenizer.decode(generation.tokens[generation.prompt_len :]),
        "tokens": generation.tokens,
        "prompt_len": generation.prompt_len,
        "prefill_tokens_per_s": generation.prefill_tokens_per_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
        "reference": reference_name(folder),
    }
    write_smoke_result(arguments.output, facts, distance, options.tolerance(arguments))


if __name__ == "__main__":
    restart_with_huge_pages()
    run_cli(main)
