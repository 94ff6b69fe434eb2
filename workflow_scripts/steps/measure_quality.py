#!/usr/bin/env python3
"""Measures how well an engine predicts held-out text, beside the float32 reference.

Writes perplexity, KL divergence and top-1 agreement, the engine's size and its speed, as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli import options as options
from mpt_trt.cli.console import run_cli
from mpt_trt.system.process import restart_with_huge_pages

if TYPE_CHECKING:
    from mpt_trt.engines.load import LoadedEngine

SPEED_PROMPT, SPEED_NEW_TOKENS, SPEED_ROUNDS = 128, 32, 3
KIB = 1 << 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine_dir", type=Path, required=True, help="the engine directory")
    parser.add_argument(
        "--model_dir", required=True, help="hub id or folder of the Hugging Face checkpoint"
    )
    parser.add_argument("--revision", default="main", help="on the hub (default: %(default)s)")
    parser.add_argument(
        "--reference", type=Path, required=True, help="file that compute_reference.py wrote"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    options.add_runtime(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from mpt_trt.engines.load import load_engine
    from mpt_trt.evaluation.distance import measure_speed
    from mpt_trt.evaluation.heldout import read_heldout

    heldout = read_heldout(arguments.reference)
    engine = load_engine(
        arguments.engine_dir, arguments.runtime, arguments.num_threads, arguments.activations
    )
    window_length = heldout.inputs.shape[1]
    engine.manifest.limits.require_window(window_length)
    new_tokens = min(SPEED_NEW_TOKENS, engine.model.capacity // 2)
    prompt_len = min(SPEED_PROMPT, window_length, engine.model.capacity - new_tokens)
    prompt = heldout.inputs[0, :prompt_len].tolist()
    speed = measure_speed(engine, prompt, new_tokens, SPEED_ROUNDS)
    peak_memory = peak_memory_of_ranks(engine)

    # Only now: PyTorch is no part of the engine's memory.
    from mpt_trt.checkpoint import hub
    from mpt_trt.evaluation.perplexity import engine_size, measure, require_same_model
    from mpt_trt.evaluation.quality_result import QualityResult, write_quality
    from mpt_trt.evaluation.reference import read_head
    from mpt_trt.quantization.schemes import as_mapping
    from mpt_trt.system.machine import describe_machine

    head = None
    if engine.is_first_rank:
        head = read_head(hub.local_folder(arguments.model_dir, arguments.revision)[0])
        require_same_model(arguments.engine_dir, engine.manifest, heldout, head)
    figures = measure(engine, heldout, head)
    if figures is None:
        return
    result = QualityResult(
        engine_dir=str(arguments.engine_dir),
        model_name=engine.manifest.model_name,
        ranks=engine.manifest.tp_size,
        dtype=engine.manifest.dtype,
        quantization=as_mapping(engine.manifest.quantization.scheme),
        kv_cache=engine.manifest.quantization.kv_cache,
        builder=engine.manifest.builder,
        runtime=engine.runtime,
        fallback_reason=engine.fallback_reason,
        machine=describe_machine(),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        reference=heldout.reference,
        text=heldout.text,
        text_hash=heldout.text_hash,
        window_length=window_length,
        figures=figures,
        size=engine_size(arguments.engine_dir, engine.manifest),
        speed=speed,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        peak_memory=peak_memory,
    )
    write_quality(result, arguments.output)
    excess = figures.excess
    print(
        f"perplexity {figures.perplexity:.4f} (reference {figures.reference_perplexity:.4f}), "
        f"{excess.mean:+.2g} nats a token, KL {figures.kl.mean:.2g}, "
        f"same top token {figures.top1.mean:.2%}, over {figures.tokens} tokens"
    )


def peak_memory_of_ranks(engine: LoadedEngine) -> int:
    """Bytes of host memory, the sum of each rank's largest resident set so far."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return own if engine.communicator is None else sum(engine.communicator.exchange(own))


if __name__ == "__main__":
    restart_with_huge_pages()
    run_cli(main)
