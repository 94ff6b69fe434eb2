"""Measure how well an engine predicts held-out text, compared with the float32 reference."""

from __future__ import annotations

import argparse

from mpt_trt.checkpoint.source import checkpoint_folder
from mpt_trt.cli.engines import open_engine
from mpt_trt.cli.output_options import input_paths
from mpt_trt.cli.progress import steps_progress
from mpt_trt.cli.results import show_quality
from mpt_trt.evaluation.heldout import read_heldout
from mpt_trt.evaluation.measured_engine import describe_engine, peak_memory_of_ranks
from mpt_trt.evaluation.quality_result import QualityResult, write_quality
from mpt_trt.evaluation.recorded_generation import measure_speed
from mpt_trt.system.progress_lines import no_progress, say
from mpt_trt.system.replace import require_writable

SPEED_PROMPT, SPEED_NEW_TOKENS, SPEED_ROUNDS = 128, 32, 5


def run(options: argparse.Namespace) -> None:
    inputs = input_paths(options)
    require_writable(options.output, inputs)
    heldout = read_heldout(options.reference)
    engine = open_engine(options)
    window_length = heldout.inputs.shape[1]
    engine.manifest.spec.limits.require_window(window_length)
    new_tokens = min(SPEED_NEW_TOKENS, engine.model.capacity // 2)
    prompt_len = min(SPEED_PROMPT, window_length, engine.model.capacity - new_tokens)
    prompt = heldout.inputs[0, :prompt_len].tolist()
    if engine.is_first_rank:
        say(f"Measuring speed with {engine.runtime}")
    speed = measure_speed(engine, prompt, new_tokens, SPEED_ROUNDS)
    peak_memory = peak_memory_of_ranks(engine)
    num_rows = engine.model.max_batch_size
    throughput = measure_speed(engine, prompt, new_tokens, SPEED_ROUNDS, num_rows)

    # Both import PyTorch, whose memory must not count as the engine's.
    from mpt_trt.evaluation.perplexity import engine_size, measure, require_same_model
    from mpt_trt.evaluation.reference import read_head

    head = None
    if engine.is_first_rank:
        folder = checkpoint_folder(options.model_dir, options.revision)[0]
        head = read_head(folder, options.adapter)
        require_same_model(options.engine_dir, engine.manifest, heldout, head)
    if not engine.is_first_rank:
        measure(engine, heldout, head, no_progress)
        return
    with steps_progress("Reading held-out text, token", heldout.inputs.size) as advance:
        figures = measure(engine, heldout, head, advance)
    if figures is None:
        return
    result = QualityResult(
        **describe_engine(engine, options.engine_dir, peak_memory),
        reference=heldout.reference,
        text=heldout.text,
        text_hash=heldout.text_hash,
        window_length=window_length,
        figures=figures,
        size=engine_size(options.engine_dir, engine.manifest),
        speed=speed,
        throughput=throughput,
        throughput_rows=num_rows,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
    )
    write_quality(result, options.output, inputs)
    show_quality(result, options.output)
