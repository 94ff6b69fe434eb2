"""A result of a smoke test, as its file holds it."""

from __future__ import annotations

from typing import Any

SMOKE_RESULT: dict[str, Any] = {
    "engine_dir": "engine",
    "engines": ["rank0.engine"],
    "builder": {"package": "tensorrt", "version": "10", "compute_capabilities": ["8.9"]},
    "ranks": 1,
    "runtime": "ONNX Runtime",
    "fallback_reason": None,
    "prompt": "to",
    "text": " be",
    "tokens": [1, 2],
    "prompt_len": 1,
    "speed": {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 1.0},
    "reference": "PyTorch",
    "distance": {"max_abs": 0.0, "mean_kl": 0.0, "top1": 1.0, "positions": 2},
    "tolerance": {"max_abs": 0.1, "mean_kl": 0.1, "min_top1": 0.9},
}
