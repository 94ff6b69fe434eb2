"""Errors about weight files, for readers of every format."""

from __future__ import annotations

from pathlib import Path

from mpt_trt.checkpoint.other_weights import describe_content
from mpt_trt.errors import MptTrtError

# Some libraries repeat a whole header.
MOST_CHARACTERS = 300


def broken(path: Path, error: Exception, tensor: str) -> MptTrtError:
    """Makes the error for a damaged file. tensor: the unreadable tensor; None: the whole file."""
    reason = (str(error) or type(error).__name__).splitlines()[0][:MOST_CHARACTERS]
    if path.is_file() and path.stat().st_size == 0:
        reason = "the file is empty"
    elif content := describe_content(path):
        return MptTrtError(f"{path}: {content}")
    return MptTrtError(
        f"{path}: truncated or damaged, {tensor} cannot be read ({reason}); download the file again"
    )


def not_float(path: Path, name: str, dtype: str) -> MptTrtError:
    """Makes the error for a tensor of integers or of numbers with fewer than 16 bits."""
    return MptTrtError(
        f"{path}: tensor {name} is {dtype}; only unquantized checkpoints (float32, float16, "
        "bfloat16) are read"
    )
