"""Write a prompt and its tokens as JSON."""

from __future__ import annotations

import argparse

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.source import checkpoint_folder, tokenizer_folder
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.cli.output_options import input_paths
from mpt_trt.evaluation.prompt_file import Prompt, write_prompt


def run(options: argparse.Namespace) -> None:
    folder, _ = checkpoint_folder(options.model_dir)
    asked = options.tokenizer_dir
    tokenizer = read_tokenizer(folder if asked is None else tokenizer_folder(asked, "main"))
    tokenizer.require_fitting(read_hf_config(folder).vocab_size)
    prompt = Prompt(options.prompt, tuple(tokenizer.encode(options.prompt)))
    write_prompt(prompt, options.output, input_paths(options))
