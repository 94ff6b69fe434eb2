#!/usr/bin/env python3
"""Runs an engine and compares its logits with the float32 reference.

Writes the result as JSON. When the distance exceeds the tolerance, the result goes to
{output}.rejected instead and the exit status is 1. The other of the two files is removed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from mpt_trt import arguments as options
from mpt_trt.console import run_cli
from mpt_trt.settings import default_tolerance, parse_settings


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
    default = default_tolerance()
    group = parser.add_argument_group("tolerance; see config.yaml")
    group.add_argument(
        "--max_abs", type=float, default=default.max_abs, help="(default: %(default)s)"
    )
    group.add_argument(
        "--mean_kl", type=float, default=default.mean_kl, help="(default: %(default)s)"
    )
    group.add_argument(
        "--min_top1", type=float, default=default.min_top1, help="(default: %(default)s)"
    )
    options.add_runtime(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from mpt_trt import hub, verification
    from mpt_trt.engines.loading import load_engine
    from mpt_trt.errors import MptTrtError
    from mpt_trt.files import write_json
    from mpt_trt.reference import reference_logits, reference_name
    from mpt_trt.settings import Tolerance
    from mpt_trt.tokenizer import read_tokenizer

    folder, _ = hub.local_folder(arguments.model_dir, arguments.revision)
    tokenizer_dir = arguments.tokenizer_dir
    tokenizer = read_tokenizer(
        folder if tokenizer_dir is None else hub.tokenizer_folder(tokenizer_dir, "main")
    )
    engine = load_engine(arguments.engine_dir, arguments.runtime, arguments.num_threads)
    prompt = tokenizer.encode(arguments.prompt)
    trial = verification.run_trial(engine, prompt, arguments.max_new_tokens)
    if not engine.is_first_rank:
        return
    reference = reference_logits(folder, trial.tokens[:-1]).numpy()
    distance = verification.distance(trial.logits, reference)
    tolerance = Tolerance(arguments.max_abs, arguments.mean_kl, arguments.min_top1)
    violations = distance.violations(tolerance)
    result = {
        "engine_dir": str(arguments.engine_dir),
        "engines": [rank.engine for rank in engine.manifest.ranks],
        "builder": asdict(engine.manifest.builder),
        "ranks": engine.manifest.tp_size,
        "runtime": engine.runtime,
        "stood_in_because": engine.stood_in_because,
        "prompt": arguments.prompt,
        "text": tokenizer.decode(trial.tokens[trial.prompt_len :]),
        "tokens": trial.tokens,
        "prompt_len": trial.prompt_len,
        "prefill_tokens_per_s": trial.prefill_tokens_per_s,
        "decode_tokens_per_s": trial.decode_tokens_per_s,
        "reference": reference_name(folder),
        "distance": asdict(distance),
        "tolerance": asdict(tolerance),
        "passed": not violations,
    }
    rejected = arguments.output.with_name(arguments.output.name + ".rejected")
    if violations:
        arguments.output.unlink(missing_ok=True)
        write_json(rejected, result)
        raise MptTrtError(
            f"{arguments.engine_dir}: too far from the reference: {', '.join(violations)}; "
            f"see {rejected}"
        )
    rejected.unlink(missing_ok=True)
    write_json(arguments.output, result)


if __name__ == "__main__":
    run_cli(main)
