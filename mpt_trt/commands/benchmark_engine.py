"""Measure an engine's speed over batch sizes, prompt lengths and output lengths."""

from __future__ import annotations

import argparse
import datetime
import resource

from mpt_trt.cli.engines import open_engine
from mpt_trt.cli.output_options import input_paths
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.throughput import (
    LoadSpeed,
    ThroughputResult,
    all_loads,
    measure_load,
    write_throughput,
)
from mpt_trt.quantization.schemes import as_mapping
from mpt_trt.system.machine import describe_machine
from mpt_trt.system.progress_lines import say
from mpt_trt.system.replace import require_writable

KIB = 1 << 10
HEADER = "batch  prompt  output   first token    between tokens (median, p99)     tokens/s"


def run(options: argparse.Namespace) -> None:
    inputs = input_paths(options)
    require_writable(options.output, inputs)
    if options.rounds < 1:
        raise MptTrtError(f"--rounds = {options.rounds}: at least 1 is required")
    engine = open_engine(options)
    model, spec = engine.model, engine.manifest.spec
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
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    ranks = engine.communicator
    peak_memory = own if ranks is None else sum(ranks.exchange(own))
    if not engine.is_first_rank:
        return
    result = ThroughputResult(
        engine_dir=str(options.engine_dir),
        model_name=engine.manifest.model_name,
        ranks=spec.tp_size,
        dtype=spec.dtype,
        quantization=as_mapping(spec.scheme),
        kv_cache=spec.quantization.kv_cache,
        builder=engine.manifest.builder,
        runtime=engine.runtime,
        fallback_reason=engine.fallback_reason,
        machine=describe_machine(),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        peak_memory=peak_memory,
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
