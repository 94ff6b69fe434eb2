"""Result files of llama.cpp's quantizations, and the models that they can be made of."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from mpt_trt.evaluation.result_file import read_result
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import weights

MOST_WEIGHTS = 1_000_000_000
"""Larger models are not measured: files of 4 bytes per weight, and hours on a CPU."""


@dataclass(frozen=True)
class Point:
    """A quantization. kl: nats per token. top1: share of positions with the same top token."""

    name: str
    megabytes: float
    kl: float
    top1: float


@dataclass(frozen=True)
class LlamaCppResult:
    """Content of a result file. text_hash, windows: the held-out text, and its shape in tokens."""

    llama_cpp_python: str
    text_hash: str
    windows: tuple[int, ...]
    points: tuple[Point, ...]

    def to_json(self) -> str:
        """The file's content, which `read_llama_cpp` reads."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_llama_cpp(path: Path) -> LlamaCppResult:
    """Reads a result; raises MptTrtError when the file is another."""
    return read_result(path, LlamaCppResult, "a result of measure_llama_cpp.py")


def is_llama_cpp_installed() -> bool:
    """Returns whether both packages are installed."""
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def fits_llama_cpp(config: MptConfig) -> bool:
    """Returns whether llama.cpp computes this architecture, and the model is small enough."""
    is_plain = config.position_embedding == "alibi" and config.norm_type == "layernorm"
    has_usual_attention = config.num_kv_heads == config.num_heads and not config.qk_ln
    is_usual = config.softmax_scale == config.head_dim**-0.5 and config.logit_scale == 1
    size = sum(math.prod(weight.shape) for weight in weights(config))
    fits = is_plain and has_usual_attention and is_usual and not config.bias
    return fits and size <= MOST_WEIGHTS
