"""Measure llama.cpp's quantizations of a model on held-out text."""

from __future__ import annotations

import argparse

from mpt_trt.checkpoint.source import checkpoint_folder
from mpt_trt.cli.output_options import input_paths
from mpt_trt.cli.progress import steps_progress
from mpt_trt.evaluation.heldout import read_heldout
from mpt_trt.evaluation.llama_cpp import TYPES, measure_llama_cpp
from mpt_trt.system.replace import replace_file, require_writable


def run(options: argparse.Namespace) -> None:
    inputs = input_paths(options)
    require_writable(options.output, inputs)
    heldout = read_heldout(options.reference)
    folder = checkpoint_folder(options.model_dir, options.revision)[0]
    with (
        steps_progress("Measuring llama.cpp, type", len(TYPES)) as advance,
        replace_file(options.output, inputs) as partial,
    ):
        gguf_folder = partial.with_name("gguf")
        gguf_folder.mkdir()
        result = measure_llama_cpp(folder, options.adapter, heldout, gguf_folder, advance)
        partial.write_text(result.to_json(), encoding="utf-8")
    for point in result.points:
        print(f"{point.name}: {point.megabytes:.2f} MB, mean KL {point.kl:.4f} nats")
