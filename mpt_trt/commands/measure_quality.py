"""Measure how well an engine predicts held-out text, compared with the float32 reference."""

from __future__ import annotations

import argparse
from typing import Any

from mpt_trt.api.engine import Engine
from mpt_trt.api.text import EngineText
from mpt_trt.checkpoint.source import checkpoint_folder
from mpt_trt.cli.engines import open_engine
from mpt_trt.cli.output_options import input_paths
from mpt_trt.cli.progress import steps_progress
from mpt_trt.cli.results import show_quality
from mpt_trt.engines.load import LoadedEngine
from mpt_trt.evaluation.heldout import HeldOut, read_heldout, read_text
from mpt_trt.evaluation.measured_engine import describe_engine, peak_memory_of_ranks
from mpt_trt.evaluation.quality_result import Figures, QualityResult, WholeText, write_quality
from mpt_trt.evaluation.recorded_generation import measure_speed
from mpt_trt.evaluation.whole_text import measure_text, text_windows, window_length_of
from mpt_trt.harness.tasks import open_model, require_lm_eval, run_tasks
from mpt_trt.system.progress_lines import no_progress, say
from mpt_trt.system.replace import require_writable

SPEED_PROMPT, SPEED_NEW_TOKENS, SPEED_ROUNDS = 128, 32, 5


def run(options: argparse.Namespace) -> None:
    inputs = input_paths(options)
    require_writable(options.output, inputs)
    heldout = read_heldout(options.reference)
    if options.tasks:
        require_lm_eval()
    engine = open_engine(options)
    window_length = heldout.inputs.shape[1]
    engine.manifest.spec.limits.require_window(window_length)
    peak_memory, speeds = _speeds(engine, heldout)
    # It imports PyTorch, whose memory must not count as the engine's.
    from mpt_trt.evaluation.perplexity import engine_size

    figures = _figures(engine, heldout, options)
    whole_text, tasks = _text_and_tasks(engine, options)
    if figures is None:
        return
    result = QualityResult(
        **describe_engine(engine, options.engine_dir, peak_memory),
        **speeds,
        reference=heldout.reference,
        text=heldout.text,
        text_hash=heldout.text_hash,
        window_length=window_length,
        figures=figures,
        size=engine_size(options.engine_dir, engine.manifest),
        whole_text=whole_text,
        tasks=tasks,
    )
    write_quality(result, options.output, inputs)
    show_quality(result, options.output)


def _speeds(engine: LoadedEngine, heldout: HeldOut) -> tuple[int, dict[str, Any]]:
    """Measures the peak of memory, in bytes, and the result's fields about speed, on every rank."""
    new_tokens = min(SPEED_NEW_TOKENS, engine.model.capacity // 2)
    most = engine.model.capacity - new_tokens
    prompt_len = min(SPEED_PROMPT, heldout.inputs.shape[1], most)
    prompt = heldout.inputs[0, :prompt_len].tolist()
    if engine.is_first_rank:
        say(f"Measuring speed with {engine.runtime}")
    speed = measure_speed(engine, prompt, new_tokens, SPEED_ROUNDS)
    peak_memory = peak_memory_of_ranks(engine)
    num_rows = engine.model.max_batch_size
    return peak_memory, {
        "speed": speed,
        "throughput": measure_speed(engine, prompt, new_tokens, SPEED_ROUNDS, num_rows),
        "throughput_rows": num_rows,
        "prompt_len": prompt_len,
        "new_tokens": new_tokens,
    }


def _figures(engine: LoadedEngine, heldout: HeldOut, options: argparse.Namespace) -> Figures | None:
    """Compares the engine with the reference on held-out text; None on other ranks than 0."""
    from mpt_trt.evaluation.perplexity import measure, require_same_model  # as above
    from mpt_trt.evaluation.reference import read_head

    if not engine.is_first_rank:
        return measure(engine, heldout, None, no_progress)
    folder = checkpoint_folder(options.model_dir, options.revision)[0]
    head = read_head(folder, options.adapter)
    require_same_model(options.engine_dir, engine.manifest, heldout, head)
    with steps_progress("Reading held-out text, token", heldout.inputs.size) as advance:
        return measure(engine, heldout, head, advance)


def _text_and_tasks(
    engine: LoadedEngine, options: argparse.Namespace
) -> tuple[WholeText | None, dict[str, dict[str, float]]]:
    """Reads --text as a whole and runs --tasks, if they are given. Every rank takes part."""
    if options.text is None and not options.tasks:
        return None, {}
    text = EngineText.read(options.engine_dir, engine.manifest, options.tokenizer_dir)
    return _whole_text(engine, options, text), _tasks(engine, options, text)


def _whole_text(
    engine: LoadedEngine, options: argparse.Namespace, engine_text: EngineText
) -> WholeText | None:
    if options.text is None:
        return None
    text = read_text(options.text)
    tokenizer = engine_text.require_tokenizer()
    length = window_length_of(engine)
    if not engine.is_first_rank:
        return measure_text(engine, text, tokenizer, length)
    count = len(text_windows(text, tokenizer, length))
    with steps_progress("Reading the whole text, window", count) as advance:
        return measure_text(engine, text, tokenizer, length, advance)


def _tasks(
    engine: LoadedEngine, options: argparse.Namespace, text: EngineText
) -> dict[str, dict[str, float]]:
    if not options.tasks:
        return {}
    if engine.is_first_rank:
        say(f"Running tasks of lm-eval: {', '.join(options.tasks)}")
    model = open_model(Engine(engine, text))
    return run_tasks(model, options.tasks, options.task_dir)
