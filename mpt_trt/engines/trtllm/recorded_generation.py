"""Reads the generation that TensorRT-LLM's runtime has recorded.

Not in `generation_run`, which runs where TensorRT-LLM is installed and little else.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpt_trt.calibration.npz_file import NpzFile
from mpt_trt.engines.trtllm.generation_run import TrtllmGeneration

# Far beyond any engine's.
MOST_TOKENS = 1 << 24


def read_trtllm_generation(path: Path) -> TrtllmGeneration:
    """Reads a file that `record_trtllm_generation` wrote; raises MptTrtError for any other."""
    file = NpzFile(path, "make it with run_trtllm.py")
    tokens, prompt_len = file.array("tokens", MOST_TOKENS), file.array("prompt_len", 1)
    if tokens.ndim != 1 or not (_is_integral(tokens) and _is_integral(prompt_len)):
        raise file.damaged("tokens or prompt_len are not integers in a row")
    new_tokens = len(tokens) - int(prompt_len.item())
    if not 0 < new_tokens < len(tokens) or tokens.min() < 0:
        raise file.damaged(f"{len(tokens)} tokens with {new_tokens} new ones are no generation")
    logits_shape = file.shape("logits")
    if len(logits_shape) != 2 or logits_shape[0] != new_tokens:
        raise file.damaged(f"logits have shape {list(logits_shape)} for {new_tokens} new tokens")
    # The file is not compressed, so it cannot hold more numbers than bytes.
    if math.prod(logits_shape) > path.stat().st_size:
        raise file.damaged(f"logits have shape {list(logits_shape)}, more than the file holds")
    return TrtllmGeneration(
        tokens=tokens.tolist(),
        prompt_len=len(tokens) - new_tokens,
        logits=file.floats("logits"),
        version=file.text("version"),
        compute_capability=file.text("compute_capability"),
        prefill_tokens_per_s=_speed(file, "prefill_tokens_per_s"),
        decode_tokens_per_s=_speed(file, "decode_tokens_per_s"),
    )


def _is_integral(values: NDArray) -> bool:
    return values.dtype.kind in "iu"


def _speed(file: NpzFile, key: str) -> float:
    value = float(file.array(key, 1).reshape(-1).astype(np.float64).sum())
    if not 0 <= value < math.inf:
        raise file.damaged(f"{key} = {value}: no speed")
    return value
