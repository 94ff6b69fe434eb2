"""Command-line options of the tools that calibrate; their defaults are those of config.yaml."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt_trt.calibration.defaults import BATCH_SIZE, TEXT


@dataclass(frozen=True)
class _ConfigDefault:
    """A default of config.yaml's schema that is read only when a tool calibrates.

    Conversion has these options but mostly does not calibrate, and reading YAML takes 0.05 s.
    """

    key: str

    @property
    def value(self) -> Any:
        from mpt_trt.workflow.settings import default_calibration

        return TEXT if self.key == "text" else getattr(default_calibration(), self.key)

    def __str__(self) -> str:
        """Default value as `--help` shows it."""
        return str(self.value)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the options that `calibration_requests` reads, after `fill_in`."""
    group = parser.add_argument_group("calibration")
    add, default = group.add_argument, "(default: %(default)s)"
    add(
        "--calib_text",
        type=Path,
        default=_ConfigDefault("text"),
        help="calibration text (default: the one that ships with mpt-trt)",
    )
    add(
        "--calib_size",
        type=int,
        default=_ConfigDefault("num_samples"),
        help=f"number of samples of the text {default}",
    )
    add(
        "--calib_max_seq_length",
        type=int,
        default=_ConfigDefault("sequence_length"),
        help=f"tokens per sample {default}",
    )
    add(
        "--batch_size",
        type=int,
        default=BATCH_SIZE,
        help="samples per batch; a smaller number takes less memory, and more time on a GPU "
        f"{default}",
    )
    add(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default=_ConfigDefault("device"),
        help=f"device of the computation; auto: a GPU if PyTorch finds one {default}",
    )
    add(
        "--tokenizer_dir",
        help="hub id or folder of the tokenizer (default: that of the checkpoint)",
    )


def fill_in(options: argparse.Namespace) -> None:
    """Fill in the defaults of the options that were not given."""
    for name, value in list(vars(options).items()):
        if isinstance(value, _ConfigDefault):
            setattr(options, name, value.value)
