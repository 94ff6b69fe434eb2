"""Calibration settings from parsed options."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from mpt_trt.calibration.block_stream import Computation
from mpt_trt.calibration.samples import read_samples
from mpt_trt.checkpoint.tokenizer import Tokenizer
from mpt_trt.errors import MptTrtError


def calibration_samples(options: argparse.Namespace, tokenizer: Tokenizer) -> Tensor:
    """Reads the samples, token ids int64 `[calib_size, calib_max_seq_length]`."""
    return read_samples(
        options.calib_text, tokenizer, options.calib_size, options.calib_max_seq_length
    )


def computation(options: argparse.Namespace, dtype: str) -> Computation:
    """Makes device, type and batch size of calibration.

    dtype: type of computation on a GPU; a CPU computes in float32.

    Raises MptTrtError for a number below 1, and when a requested GPU is missing.
    """
    for name in ("calib_size", "calib_max_seq_length", "batch_size"):
        if (value := getattr(options, name)) < 1:
            raise MptTrtError(f"--{name} = {value}: at least 1 is required")
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise MptTrtError("--device = cuda: PyTorch finds no GPU; choose cpu or auto")
    if options.device == "cpu" or not has_gpu:
        return Computation("cpu", torch.float32, options.batch_size)
    return Computation("cuda", getattr(torch, dtype), options.batch_size)
