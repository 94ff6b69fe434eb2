#!/usr/bin/env python3
"""Serve an engine over HTTP, with OpenAI's interface.

Requests join a running batch and leave it when they end. The environment variable MPT_TRT_API_KEY
sets a key that clients must send. On SIGTERM, the server answers the running requests and exits.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import model_options, options
from mpt_trt.cli.console import run_command
from mpt_trt.cli.parser import tool_parser
from mpt_trt.system.process import restart_with_huge_pages

MAX_PORT = 65535


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__, "workflow_scripts/serve.py --engine_dir my_engine --port 8000")
    parser.add_argument("--engine_dir", type=Path, required=True, help="the engine directory")
    model_options.add_engine_tokenizer(parser)
    parser.add_argument(
        "--chat_template",
        type=Path,
        metavar="FILE",
        help="use this Jinja template instead of the tokenizer's",
    )
    parser.add_argument(
        "--served_model_name", help="name of the model for clients (default: the engine's)"
    )
    parser.add_argument(
        "--log_level",
        default="warning",
        help="least important messages shown; info: every request (default: %(default)s)",
    )
    group = parser.add_argument_group("address")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    group.add_argument(
        "--port", type=_port, default=8000, help="port; 0: any free one (default: %(default)s)"
    )
    _add_limits(parser.add_argument_group("limits"))
    options.add_runtime(parser)
    return parser


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max_waiting",
        type=_integer(0),
        default=64,
        help="completions that may wait for a cache row; more are refused with status 429 "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=_timeout,
        default=300,
        help="seconds per request; then it is answered with status 504 (default: %(default)s)",
    )
    group.add_argument(
        "--max_body_bytes",
        type=_integer(1),
        default=1 << 20,
        help="maximum size of a request's body (default: %(default)s)",
    )
    group.add_argument(
        "--piece_tokens",
        type=_integer(1),
        help="maximum number of prompt tokens per step; other requests wait for such a step "
        "(default: the engine's max_input_len; on a GPU, prompts that wait together may share a "
        "step of up to 1024 tokens)",
    )
    group.add_argument(
        "--drain",
        type=_integer(0),
        default=30,
        help="seconds that running requests have after SIGTERM (default: %(default)s)",
    )
    group.add_argument(
        "--on_failure",
        choices=["continue", "exit"],
        default="continue",
        help="what the server does if a step of the engine fails; the running requests get status "
        "500 in any case (default: %(default)s; engines of several ranks always exit)",
    )


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 to {MAX_PORT} are")
    return int(text)


def _integer(least: int) -> Callable[[str], int]:
    """Makes the type of an option that is an integer of at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
        return int(text)

    return parse


def _timeout(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of seconds above 0")
    return seconds


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(make_parser, "mpt_trt.commands.serve")
