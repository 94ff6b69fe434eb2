#!/usr/bin/env python3
"""Generate text with an engine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import model_options, options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.ignored_options import OF_RUN, add_ignored
from mpt_trt.cli.parser import tool_parser
from mpt_trt.system.process import restart_with_huge_pages

DEFAULT_TEXT = "Born in north-east France, Soyer trained as a"


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        'workflow_scripts/run.py --engine_dir my_engine --max_output_len 64 --input_text "def '
        'fibonacci"',
    )
    parser.add_argument("--engine_dir", type=Path, required=True, help="the engine directory")
    parser.add_argument(
        "--max_output_len", type=int, required=True, help="maximum number of new tokens per prompt"
    )
    model_options.add_engine_tokenizer(parser)
    parser.add_argument(
        "--log_level",
        default="warning",
        help="least important messages shown (default: %(default)s)",
    )
    _add_input_and_output(parser)
    _add_chat(parser)
    _add_choice_of_tokens(parser)
    options.add_runtime(parser)
    add_ignored(parser, OF_RUN)
    return parser


def _add_input_and_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--input_text", nargs="+", default=[DEFAULT_TEXT], help="one or more prompts"
    )
    source.add_argument(
        "--input_file",
        "--input_tokens",
        type=Path,
        help="file of prompts: .txt with one text per line, .csv or .npy with one row of token ids "
        "per prompt; with --chat: .txt, or .json with messages",
    )
    group.add_argument(
        "--max_input_length",
        type=int,
        help="keep only the last tokens of each prompt, at most this many",
    )
    group.add_argument(
        "--no_add_special_tokens",
        action="store_true",
        help="do not let the tokenizer add its special tokens",
    )
    group.add_argument("--output_csv", type=Path, help="write token ids, one row per output")
    group.add_argument("--output_npy", type=Path, help="write token ids, padded, as an array")
    group.add_argument("--streaming", action="store_true", help="print text while it is generated")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("chat")
    group.add_argument(
        "--chat",
        action="store_true",
        help="treat prompts as messages of a user, and apply the tokenizer's chat template (for "
        "the hub's mpt-*-chat and mpt-*-instruct: that of the model card)",
    )
    group.add_argument(
        "--chat_template", type=Path, metavar="FILE", help="use this Jinja template instead"
    )


def _add_choice_of_tokens(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("choice of tokens")
    group.add_argument(
        "--num_beams",
        type=int,
        default=1,
        help="beam search with this width (default: %(default)s)",
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, help="divides the logits (default: %(default)s)"
    )
    group.add_argument(
        "--top_k",
        type=int,
        default=1,
        help="sample from this many most likely tokens; 1: greedy, 0: all (default: %(default)s)",
    )
    group.add_argument(
        "--top_p",
        type=float,
        default=0.0,
        help="sample from the most likely tokens that together reach this probability; 0: off "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--length_penalty",
        type=float,
        default=1.0,
        help="exponent of the length that divides a beam's score (default: %(default)s)",
    )
    group.add_argument(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="above 1: lowers the probability of tokens that have occurred; 0.01 to 100 "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--random_seed", type=int, default=0, help="seed of sampling (default: %(default)s)"
    )
    group.add_argument(
        "--end_id",
        type=int,
        nargs="+",
        help="tokens that end an output (default: the model's)",
    )
    group.add_argument(
        "--stop",
        nargs="+",
        metavar="TEXT",
        help="strings that end an output and are not part of it",
    )


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(make_parser, "mpt_trt.commands.run")
