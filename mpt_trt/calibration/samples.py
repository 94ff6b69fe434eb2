"""Samples of a text for calibration."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mpt_trt.checkpoint.tokenizer import Tokenizer
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_text_file


def read_samples(path: Path, tokenizer: Tokenizer, number: int, length: int) -> Tensor:
    """Cuts samples from a text, evenly spread: token ids, int64 `[number, length]`.

    Raises MptTrtError, with the numbers, when the text is too short for samples without overlap.
    """
    text = read_text_file(path).replace("\r\n", "\n").replace("\r", "\n")
    tokens = tokenizer.encode(text)
    if len(tokens) < number * length:
        raise MptTrtError(
            f"{path}: {len(tokens)} tokens, but {number} samples of {length} tokens are "
            f"{number * length}; give a longer text, fewer samples or shorter ones"
        )
    gaps = max(number - 1, 1)
    starts = (index * (len(tokens) - length) // gaps for index in range(number))
    return torch.tensor([tokens[start : start + length] for start in starts])
