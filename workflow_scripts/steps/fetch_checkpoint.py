#!/usr/bin/env python3
"""Fetch a checkpoint from the Hugging Face hub, in two steps.

`resolve` records the commit that a revision stands for. `fetch` downloads the files of that commit
into the hub's cache and makes a folder of links to them. So a branch that moves later changes
nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli.console import run_command
from mpt_trt.cli.output_options import add_force
from mpt_trt.cli.parser import tool_parser


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "workflow_scripts/steps/fetch_checkpoint.py resolve --source mosaicml/mpt-7b "
        "--revision main --output my_revision.json",
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for add_step in (_add_resolve, _add_fetch):
        step = add_step(steps)
        step.add_argument(
            "--log_level",
            default="info",
            choices=["debug", "info", "warning", "error"],
            help="least important messages shown (default: %(default)s)",
        )
    return parser


def _add_resolve(steps: argparse._SubParsersAction) -> argparse.ArgumentParser:
    step = steps.add_parser(
        "resolve",
        help="record the commit of a revision",
        description="Records {source, revision, commit} as JSON. A file that already records this "
        "source and revision keeps its commit: delete it to follow a branch that has moved.",
    )
    step.add_argument("--source", required=True, help="hub id (owner/name)")
    step.add_argument(
        "--revision", default="main", help="branch, tag or commit (default: %(default)s)"
    )
    step.add_argument("--output", type=Path, required=True, help="JSON file to write")
    return step


def _add_fetch(steps: argparse._SubParsersAction) -> argparse.ArgumentParser:
    step = steps.add_parser(
        "fetch",
        help="download the files of a recorded commit",
        description="Makes a folder in Hugging Face format: links into the hub's cache, and "
        "source.json, which names the commit, the files and their sizes.",
    )
    step.add_argument(
        "--revision_file", type=Path, required=True, help="JSON file that `resolve` wrote"
    )
    step.add_argument("--output_dir", type=Path, required=True, help="folder to make")
    add_force(step)
    step.add_argument(
        "--content",
        choices=["checkpoint", "tokenizer"],
        default="checkpoint",
        help="all files, or only those of the tokenizer (default: %(default)s)",
    )
    return step


if __name__ == "__main__":
    run_command(make_parser, "mpt_trt.commands.fetch_checkpoint")
