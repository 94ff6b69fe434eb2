#!/usr/bin/env python3
"""Fetches a checkpoint from the Hugging Face hub, in two steps.

`resolve` records which commit a revision stands for. `fetch` downloads the files of that commit
into the hub's cache and makes a folder of links to them. So a branch that moves later does not
change what was made from it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli.console import run_cli, set_up_logging

log = logging.getLogger("fetch_checkpoint")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    for add_step in (_add_resolve, _add_fetch):
        step = add_step(steps)
        step.add_argument(
            "--log_level",
            default="info",
            choices=["debug", "info", "warning", "error"],
            help="least important messages shown (default: %(default)s)",
        )
    return parser.parse_args()


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
    step.set_defaults(run=resolve)
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
    step.add_argument(
        "--content",
        choices=["checkpoint", "tokenizer"],
        default="checkpoint",
        help="everything, or the tokenizer alone (default: %(default)s)",
    )
    step.set_defaults(run=fetch)
    return step


def resolve(arguments: argparse.Namespace) -> None:
    from mpt_trt.checkpoint import hub
    from mpt_trt.errors import MptTrtError
    from mpt_trt.system.files import write_json

    source, revision = arguments.source, arguments.revision
    if not hub.is_hub_id(source):
        raise MptTrtError(f"--source = {source}: not a hub id (owner/name), nothing to resolve")
    record = hub.read_record(arguments.output) if arguments.output.is_file() else {}
    if (record.get("source"), record.get("revision")) != (source, revision):
        commit = hub.resolve_revision(source, revision)
        record = {"source": source, "revision": revision, "commit": commit}
    # Written in either case: make-like tools expect a new time stamp.
    write_json(arguments.output, record)
    log.info("%s (revision %s) is commit %s", source, revision, record["commit"])


def fetch(arguments: argparse.Namespace) -> None:
    from mpt_trt.checkpoint import hub

    record = hub.read_record(arguments.revision_file)
    fetchers = {"checkpoint": hub.fetch_checkpoint, "tokenizer": hub.fetch_tokenizer}
    snapshot = fetchers[arguments.content](**record)
    hub.link_folder(snapshot, arguments.output_dir)
    size = sum((arguments.output_dir / name).stat().st_size for name in snapshot.files)
    log.info("%s: %d files, %.2f GB", arguments.output_dir, len(snapshot.files), size / 1e9)


def main() -> None:
    arguments = parse_arguments()
    set_up_logging(arguments.log_level)
    arguments.run(arguments)


if __name__ == "__main__":
    run_cli(main)
