"""Options that name a model: its checkpoint, adapter, revision and tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add `--model_dir` for a Hugging Face checkpoint."""
    parser.add_argument(
        "--model_dir", required=True, help="hub id or folder of the Hugging Face checkpoint"
    )


def add_ft_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add `--model_dir` for an FT checkpoint."""
    parser.add_argument(
        "--model_dir", type=Path, required=True, help="a {tp_size}-gpu folder of an FT checkpoint"
    )


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Add `--adapter` for tools that merge it."""
    _add_adapter(parser, "folder of a LoRA adapter (PEFT) to merge into the checkpoint")


def add_merged_adapter(parser: argparse.ArgumentParser) -> None:
    """Add `--adapter` for tools that compare an engine with its checkpoint."""
    _add_adapter(parser, "folder of the LoRA adapter (PEFT) that was merged into the checkpoint")


def _add_adapter(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help=meaning)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add `--revision`."""
    parser.add_argument(
        "--revision", default="main", help="revision on the hub (default: %(default)s)"
    )


def add_checkpoint_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Add `--tokenizer_dir` for tools that read a checkpoint."""
    parser.add_argument(
        "--tokenizer_dir", help="hub id or folder of the tokenizer (default: --model_dir)"
    )


def add_engine_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Add `--tokenizer_dir` for tools that read an engine directory."""
    parser.add_argument(
        "--tokenizer_dir",
        help="hub id or folder of the tokenizer (default: the one in the engine directory)",
    )
