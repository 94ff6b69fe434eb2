"""Rejects checkpoints that TensorRT-LLM reads, but trtllm-build cannot build.

The limits come from the sources of TensorRT-LLM 1.2.1: its attention kernels are compiled for these
head sizes, and its kernels for 8-bit and 4-bit integers for GPUs before 10.0 and from 12.0 on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mpt_trt.errors import MptTrtError

HEAD_SIZES = (32, 48, 64, 80, 96, 104, 112, 128, 144, 160, 192, 224, 256)
INTEGER_ALGORITHMS = ("W8A16", "W4A16", "W8A8")
"""First letters of `quant_algo` of the schemes that compute with integers."""
WITHOUT_INTEGERS = (10, 12)
"""First major compute capability without integer kernels, and the first after it with them."""


def require_buildable(config: Mapping[str, Any], compute_capabilities: Iterable[str]) -> None:
    """Raises MptTrtError if trtllm-build cannot build a checkpoint for the GPUs of this machine.

    config: content of the checkpoint's config.json. compute_capabilities: as "8.9".
    """
    require_head_size(config["head_size"])
    integers = _integers(config["quantization"])
    first, next_ = WITHOUT_INTEGERS
    for capability in compute_capabilities:
        if integers is not None and first <= int(capability.partition(".")[0]) < next_:
            raise MptTrtError(
                f"{integers}: TensorRT-LLM has no such kernels for this GPU's compute capability "
                f"{capability}; use fp8 weights and an fp8 cache, no quantization, or backend "
                "tensorrt"
            )


def require_head_size(head_dim: int) -> None:
    """Raises MptTrtError if TensorRT-LLM's attention has no kernels for the head size."""
    if head_dim not in HEAD_SIZES:
        raise MptTrtError(
            f"head size = {head_dim} (d_model / n_heads): backend tensorrt_llm does not support "
            f"it: its attention kernels exist for {', '.join(map(str, HEAD_SIZES))}; use backend "
            "tensorrt or tensorrt_rtx"
        )


def _integers(quantization: Mapping[str, Any]) -> str | None:
    """Names the checkpoint's integers; None without any."""
    for key in ("quant_algo", "kv_cache_quant_algo"):
        value = quantization.get(key)
        if value is not None and (value.startswith(INTEGER_ALGORITHMS) or value == "INT8"):
            return f"{key} = {value}"
    return None
