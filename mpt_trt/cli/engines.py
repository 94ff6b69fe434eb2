"""Loads an engine from parsed options."""

from __future__ import annotations

import argparse

from mpt_trt.cli.own_flags import own_flags
from mpt_trt.engines.load import LoadedEngine, load_engine
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.errors import MptTrtError

FLAGS = {"num_threads": "--num_threads"}


def open_engine(options: argparse.Namespace) -> LoadedEngine:
    """Load the engine that the options of `add_runtime` describe, for this rank.

    Raises MptTrtError like `load_engine`, and when --total_threads is negative.
    """
    num_threads, total = options.num_threads, getattr(options, "total_threads", 0)
    if total < 0:
        raise MptTrtError(f"--total_threads = {total}: at least 1, or 0 for all cores, is required")
    if total and not num_threads:
        num_threads = max(1, total // read_manifest(options.engine_dir).spec.tp_size)
    with own_flags(FLAGS):
        return load_engine(
            options.engine_dir, options.runtime, num_threads, options.activations, options.trust
        )
