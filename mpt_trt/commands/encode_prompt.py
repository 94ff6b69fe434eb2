"""Write a prompt and its tokens as JSON."""

from __future__ import annotations

import argparse

from mpt_trt.checkpoint.source import tokenizer_folder
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.cli.output_options import input_paths
from mpt_trt.system.files import write_json


def run(options: argparse.Namespace) -> None:
    tokenizer = read_tokenizer(tokenizer_folder(options.tokenizer_dir, "main"))
    content = {"prompt": options.prompt, "tokens": tokenizer.encode(options.prompt)}
    write_json(options.output, content, input_paths(options))
