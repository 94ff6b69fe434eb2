"""Measure an engine's speed over batch sizes, prompt lengths and output lengths."""

from __future__ import annotations

import argparse

from mpt_trt.cli.engines import open_engine
from mpt_trt.cli.output_options import input_paths
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.measured_engine import describe_engine, peak_memory_of_ranks
from mpt_trt.evaluation.throughput import (
    LoadSpeed,
    ThroughputResult,
    all_loads,
    measure_load,
    write_throughput,
)
from mpt_trt.system.progress_lines import say
from mpt_trt.system.replace import require_writable

HEADER = "batch  prompt  output   first token    between tokens (median, p99)     tokens/s"


def run(options: argparse.Namespace) -> None:
    inputs = input_paths(options)
    require_writable(options.output, inputs)
    if options.rounds < 1:
        raise MptTrtError(f"--rounds = {options.rounds}: at least 1 is required")
    engine = open_engine(options)
    model = engine.model
    batch_sizes = options.batch_sizes or sorted({1, model.max_batch_size})
    loads = all_loads(model, batch_sizes, options.prompt_lens, options.output_lens)
    if engine.is_first_rank:
        say(f"Measuring {len(loads)} loads with {engine.runtime}")
        print(HEADER)
    speeds = []
    for load in loads:
        speeds.append(measure_load(model, load, options.rounds))
        if engine.is_first_rank:
            print(_line(speeds[-1]), flush=True)
    peak_memory = peak_memory_of_ranks(engine)
    if not engine.is_first_rank:
        return
    result = ThroughputResult(
        **describe_engine(engine, options.engine_dir, peak_memory),
        speeds=tuple(speeds),
    )
    write_throughput(result, options.output, inputs)


def _line(speed: LoadSpeed) -> str:
    load, between = speed.load, speed.between_tokens_s
    gaps = "-" if between is None else f"{1e3 * between.median:.2f} ms, {1e3 * between.p99:.2f} ms"
    return (
        f"{load.batch_size:5}  {load.prompt_len:6}  {load.new_tokens:6}  "
        f"{1e3 * speed.first_token_s.median:9.2f} ms  {gaps:>30}  {speed.tokens_per_s:11,.1f}"
    )
