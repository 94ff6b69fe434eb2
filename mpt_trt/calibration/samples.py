"""Samples of a text for calibration."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mpt_trt.checkpoint.tokenizer import Tokenizer
from mpt_trt.errors import MptTrtError


def read_samples(path: Path, tokenizer: Tokenizer, number: int, length: int) -> Tensor:
    """Cuts samples from a text, evenly spread: token ids, int64 `[number, length]`.

    Raises MptTrtError, with the numbers, when the text is too short for samples without overlap.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MptTrtError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    tokens = tokenizer.encode(text)
    if len(tokens) < number * length:
        raise MptTrtError(
            f"{path}: {len(tokens)} tokens, but {number} samples of {length} tokens are "
            f"{number * length}; give a longer text, fewer samples or shorter ones"
        )
    gaps = max(number - 1, 1)
    starts = (index * (len(tokens) - length) // gaps for index in range(number))
    return torch.tensor([tokens[start : start + length] for start in starts])
