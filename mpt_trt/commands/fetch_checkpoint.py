"""Fetch a checkpoint from the Hugging Face hub, in two steps."""

from __future__ import annotations

import argparse
import logging

from mpt_trt.checkpoint.hub_environment import require_usable_environment
from mpt_trt.checkpoint.snapshot import link_folder, read_record
from mpt_trt.checkpoint.source import is_hub_id
from mpt_trt.cli.logs import set_up_logging
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import write_json

log = logging.getLogger("fetch_checkpoint")


def run(options: argparse.Namespace) -> None:
    set_up_logging(options.log_level)
    require_usable_environment()
    steps = {"resolve": resolve, "fetch": fetch}
    steps[options.step](options)


def resolve(options: argparse.Namespace) -> None:
    # The hub's client reads the environment at import, so the environment is checked first.
    from mpt_trt.checkpoint.hub import resolve_revision

    source, revision = options.source, options.revision
    if not is_hub_id(source):
        raise MptTrtError(f"--source = {source}: not a hub id (owner/name), nothing to resolve")
    record = read_record(options.output) if options.output.is_file() else {}
    if (record.get("source"), record.get("revision")) != (source, revision):
        commit = resolve_revision(source, revision)
        record = {"source": source, "revision": revision, "commit": commit}
    # Written in either case, because make-like tools expect a new time stamp.
    write_json(options.output, record)
    log.info("%s (revision %s) is commit %s", source, revision, record["commit"])


def fetch(options: argparse.Namespace) -> None:
    from mpt_trt.checkpoint.hub import fetch_checkpoint, fetch_tokenizer  # as above

    record = read_record(options.revision_file)
    fetchers = {"checkpoint": fetch_checkpoint, "tokenizer": fetch_tokenizer}
    snapshot = fetchers[options.content](**record)
    link_folder(snapshot, options.output_dir, options.force)
    size = sum((options.output_dir / name).stat().st_size for name in snapshot.files)
    log.info("%s: %d files, %.2f GB", options.output_dir, len(snapshot.files), size / 1e9)
