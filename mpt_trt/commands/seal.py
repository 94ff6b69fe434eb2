"""Seals a finished folder: writes the list of its files beside it, so that damage is noticed."""

from __future__ import annotations

import argparse

from mpt_trt.workflow.seals import write_seal


def run(options: argparse.Namespace) -> None:

    write_seal(options.folder)
