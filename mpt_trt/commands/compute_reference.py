"""Compute the float32 reference on held-out text, for measurements of quality."""

from __future__ import annotations

import argparse

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.source import checkpoint_folder, tokenizer_folder
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.cli.output_options import input_paths
from mpt_trt.cli.progress import steps_progress
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.heldout import HeldOut, read_text, windows, write_heldout
from mpt_trt.evaluation.reference import reference_hidden, reference_name
from mpt_trt.system.files import content_hash
from mpt_trt.system.replace import require_writable


def run(options: argparse.Namespace) -> None:
    inputs = input_paths(options)
    require_writable(options.output, inputs)
    for name in ("num_windows", "window_length"):
        if getattr(options, name) < 1:
            raise MptTrtError(f"--{name} = {getattr(options, name)}: at least 1 is required")
    folder, _ = checkpoint_folder(options.model_dir, options.revision)
    config, tokenizer_dir = read_hf_config(folder), options.tokenizer_dir
    tokenizer = read_tokenizer(
        folder if tokenizer_dir is None else tokenizer_folder(tokenizer_dir, "main")
    ).require_fitting(config.vocab_size)
    tokens = tokenizer.encode(read_text(options.text))
    chosen = windows(tokens, options.num_windows, options.window_length)
    print(f"{options.text}: {len(tokens)} tokens; {len(chosen)} windows of {chosen.shape[1] - 1}")
    with steps_progress("Computing the reference, block", config.num_layers) as advance:
        hidden = reference_hidden(folder, chosen[:, :-1], options.adapter, advance)
    heldout = HeldOut(
        tokens=chosen,
        hidden=hidden.numpy(),
        text=str(options.text),
        text_hash=content_hash(options.text),
        reference=reference_name(folder),
    )
    write_heldout(heldout, options.output, inputs)
