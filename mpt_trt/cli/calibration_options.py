"""Command-line options of the tools that calibrate; their defaults are those of config.yaml."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_trt.quantization.schemes import CALIBRATION_BATCH_SIZE

if TYPE_CHECKING:
    from torch import Tensor

    from mpt_trt.calibration.block_stream import Computation
    from mpt_trt.checkpoint.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class _ConfigDefault:
    """A default of config.yaml, which is read where it counts: that takes 0.03 s."""

    key: str

    @property
    def value(self) -> Any:
        from mpt_trt.workflow.settings import default_calibration

        found = getattr(default_calibration(), self.key)
        return REPOSITORY / found if self.key == "text" else found

    def __str__(self) -> str:
        """For the help."""
        return str(self.value)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Adds the options from which `computation` and `calibration_samples` are read.

    After `fill_in`, that is.
    """
    group = parser.add_argument_group("calibration")
    add, default = group.add_argument, "(default: %(default)s)"
    add(
        "--calib_text",
        type=Path,
        default=_ConfigDefault("text"),
        help=f"text that the model reads {default}",
    )
    add(
        "--calib_size",
        type=int,
        default=_ConfigDefault("num_samples"),
        help=f"pieces of it {default}",
    )
    add(
        "--calib_max_seq_length",
        type=int,
        default=_ConfigDefault("sequence_length"),
        help=f"tokens of a piece {default}",
    )
    add(
        "--batch_size",
        type=int,
        default=CALIBRATION_BATCH_SIZE,
        help="pieces read at a time, at most; less takes less memory, and more time on a GPU "
        f"{default}",
    )
    add(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default=_ConfigDefault("device"),
        help=f"what computes; auto: a GPU where PyTorch finds one {default}",
    )
    add(
        "--tokenizer_dir",
        help="hub id or folder of the tokenizer (default: that of the Hugging Face checkpoint)",
    )


def fill_in(arguments: argparse.Namespace) -> None:
    """Reads the defaults of the options that were not given."""
    for name, found in list(vars(arguments).items()):
        if isinstance(found, _ConfigDefault):
            setattr(arguments, name, found.value)


def calibration_samples(arguments: argparse.Namespace, tokenizer: Tokenizer) -> Tensor:
    """Token ids, int64 `[calib_size, calib_max_seq_length]`."""
    from mpt_trt.calibration.samples import read_samples

    return read_samples(
        arguments.calib_text, tokenizer, arguments.calib_size, arguments.calib_max_seq_length
    )


def computation(arguments: argparse.Namespace, dtype: str) -> Computation:
    """How to calibrate. dtype: what a GPU computes in; a CPU computes in float32.

    Raises MptTrtError for a number below 1, and when there is no GPU but one is asked for.
    """
    import torch

    from mpt_trt.calibration.block_stream import Computation
    from mpt_trt.errors import MptTrtError

    for name in ("calib_size", "calib_max_seq_length", "batch_size"):
        if (value := getattr(arguments, name)) < 1:
            raise MptTrtError(f"--{name} = {value}: at least 1 is required")
    has_gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_gpu:
        raise MptTrtError("--device = cuda: PyTorch finds no GPU; take cpu, or auto")
    if arguments.device == "cpu" or not has_gpu:
        return Computation("cpu", torch.float32, arguments.batch_size)
    return Computation("cuda", getattr(torch, dtype), arguments.batch_size)
