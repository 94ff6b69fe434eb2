#!/usr/bin/env python3
"""Writes a prompt and its tokens as JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli.console import run_cli


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer_dir", required=True, help="hub id or folder of the tokenizer")
    parser.add_argument("--prompt", required=True, help="the text")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the result")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from mpt_trt.checkpoint import hub
    from mpt_trt.checkpoint.tokenizer import read_tokenizer
    from mpt_trt.system.files import write_json

    tokenizer = read_tokenizer(hub.tokenizer_folder(arguments.tokenizer_dir, "main"))
    content = {"prompt": arguments.prompt, "tokens": tokenizer.encode(arguments.prompt)}
    write_json(arguments.output, content)


if __name__ == "__main__":
    run_cli(main)
