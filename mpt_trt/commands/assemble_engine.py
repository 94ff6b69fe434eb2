"""Assemble an engine directory from the networks and plans of all ranks, by hard links."""

from __future__ import annotations

import argparse

from mpt_trt.engines.build.assemble import assemble_engine
from mpt_trt.engines.rank_descriptions import read_network_spec


def run(options: argparse.Namespace) -> None:
    tp_size = read_network_spec(options.network_dir).tp_size
    folders = [(options.network_dir, options.plan_dir)] * tp_size
    assemble_engine(folders, options.output_dir, options.trust, options.force)
