#!/usr/bin/env python3
"""Make the default calibration text: English prose and code from Python's standard library.

The text comes from documents that the demo model was trained on, and contains no held-out text of
that model. The same library gives the same text.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli.console import run_cli
from mpt_trt.cli.parser import tool_parser
from mpt_trt.system.replace import replace_file
from tools.demo_model.corpus import (
    HELD_BACK_BYTES,
    HELDOUT_BYTES,
    VALIDATION_BYTES,
    Document,
    joined,
    read_corpus,
    split_corpus,
)

# Shorter paragraphs, such as imports and headings, occur in many documents.
PARAGRAPH_CHARACTERS = 80


def make_parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        __doc__,
        "tools/make_calibration_text.py --output my_calibration.txt",
    )
    parser.add_argument(
        "--stdlib",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="folder of the standard library (default: this Python's)",
    )
    parser.add_argument(
        "--bytes", type=int, default=250_000, help="size of the text (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, help="text file to write")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    documents = read_corpus(arguments.stdlib)
    split = split_corpus(documents, HELDOUT_BYTES, VALIDATION_BYTES)
    chosen = choose(without_paragraphs_of(split["heldout"], split["training"]), arguments.bytes)
    with replace_file(arguments.output) as partial:
        partial.write_text(joined(chosen))
    print(f"{arguments.output}: {len(chosen)} documents, {sum(d.size for d in chosen)} bytes")


def without_paragraphs_of(heldout: list[Document], documents: list[Document]) -> list[Document]:
    """Selects documents that share no paragraph with a held-out document."""
    paragraphs = {
        paragraph
        for document in heldout
        for paragraph in document.text.split("\n\n")
        if len(paragraph) >= PARAGRAPH_CHARACTERS
    }
    return [d for d in documents if not any(p in d.text for p in paragraphs)]


def choose(documents: list[Document], total_bytes: int) -> list[Document]:
    """Chooses topics and library files of moderate size, about half of each, in order of a hash."""
    small, large = HELD_BACK_BYTES
    chosen: list[Document] = []
    for kind in ("topic", "library"):
        size = 0
        for document in sorted(documents, key=_order):
            if document.kind == kind and small <= document.size <= large and size < total_bytes / 2:
                chosen.append(document)
                size += document.size
    return sorted(chosen, key=_order)


def _order(document: Document) -> bytes:
    return hashlib.sha256(document.name.encode()).digest()


if __name__ == "__main__":
    run_cli(main)
