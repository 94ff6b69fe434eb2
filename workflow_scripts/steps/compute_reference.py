#!/usr/bin/env python3
"""Computes the float32 reference on held-out text, which the quality of engines is measured with.

Writes the windows of the text and what the reference's head reads, as safetensors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli.console import run_cli
from mpt_trt.workflow.settings import parse_settings


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    usual = parse_settings({}).quality
    parser.add_argument(
        "--model_dir", required=True, help="hub id or folder of the Hugging Face checkpoint"
    )
    parser.add_argument("--tokenizer_dir", help="likewise (default: that of --model_dir)")
    parser.add_argument("--revision", default="main", help="on the hub (default: %(default)s)")
    parser.add_argument(
        "--text", type=Path, default=Path(usual.text), help="UTF-8 file (default: %(default)s)"
    )
    parser.add_argument(
        "--num_windows",
        type=int,
        default=usual.num_windows,
        help="most windows, spread over the text evenly (default: %(default)s)",
    )
    parser.add_argument(
        "--window_length",
        type=int,
        default=usual.window_length,
        help="tokens of a window (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from mpt_trt.checkpoint import hub
    from mpt_trt.checkpoint.tokenizer import read_tokenizer
    from mpt_trt.errors import MptTrtError
    from mpt_trt.evaluation.heldout import HeldOut, read_text, windows, write_heldout
    from mpt_trt.evaluation.reference import reference_hidden, reference_name
    from mpt_trt.system.files import content_hash

    for name in ("num_windows", "window_length"):
        if getattr(arguments, name) < 1:
            raise MptTrtError(f"--{name} = {getattr(arguments, name)}: at least 1 is required")
    folder, _ = hub.local_folder(arguments.model_dir, arguments.revision)
    tokenizer_dir = arguments.tokenizer_dir
    tokenizer = read_tokenizer(
        folder if tokenizer_dir is None else hub.tokenizer_folder(tokenizer_dir, "main")
    )
    tokens = tokenizer.encode(read_text(arguments.text))
    chosen = windows(tokens, arguments.num_windows, arguments.window_length)
    print(f"{arguments.text}: {len(tokens)} tokens; {len(chosen)} windows of {chosen.shape[1] - 1}")
    heldout = HeldOut(
        tokens=chosen,
        hidden=reference_hidden(folder, chosen[:, :-1]).numpy(),
        text=str(arguments.text),
        text_hash=content_hash(arguments.text),
        reference=reference_name(folder),
    )
    write_heldout(heldout, arguments.output)


if __name__ == "__main__":
    run_cli(main)
