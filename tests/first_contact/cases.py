"""Built and run cases: every feature, every quantization, and two models for speed."""

from __future__ import annotations

from dataclasses import dataclass, field

from engines.test_quantized_engines import QUANTIZATIONS, WITH_FP8_CACHE
from mpt_trt.checkpoint.known_models import SHAPES, known_config
from mpt_trt.engines.compute_capabilities import FP8_CAPABILITY
from mpt_trt.engines.memory import gpu_memory
from mpt_trt.engines.spec import BuildLimits, EngineSpec
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import Fp8, Quantization, SmoothQuant
from support.checkpoints import CheckpointSpec
from support.engines import FEATURES, LIMITS

# Heads of a size that TensorRT has fused attention for.
WIDE = CheckpointSpec(hidden_size=256, num_heads=4, num_kv_heads=2, num_layers=2, vocab_size=301)
# Steps of one token per row, of one row.
SPEED_LIMITS = BuildLimits(max_batch_size=1, max_input_len=128, max_output_len=64)
# Largest difference from the same network under ONNX Runtime on a CPU, as a multiple of the logits'
# standard deviation: other kernels round elsewhere. Where activations or the cache are rounded to 8
# bits, the least difference moves some by a whole step.
BOUNDS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.4}
ROUNDED_BOUND = 0.5
# Bytes on the disk per byte of weights: two checkpoints, and a plan.
DISK_FACTOR = 3.5


@dataclass(frozen=True)
class Case:
    """One engine. kind: `feature`, `quantization`, `demo` or `random`. like: a known shape."""

    name: str
    kind: str
    dtype: str
    spec: CheckpointSpec = WIDE
    quantization: Quantization = field(default_factory=Quantization)
    like: str = ""

    @property
    def limits(self) -> BuildLimits:
        return SPEED_LIMITS if self.kind in ("demo", "random") else LIMITS

    @property
    def bound(self) -> float:
        """Bound of the difference from ONNX Runtime."""
        rounds = isinstance(self.quantization.scheme, SmoothQuant | Fp8)
        is_rounded = rounds or self.quantization.kv_cache != "auto"
        return ROUNDED_BOUND if is_rounded else BOUNDS[self.dtype]


def all_cases(capability: str, gpu_bytes: int, disk_bytes: int) -> list[Case]:
    """The cases for a GPU. capability: as "8.9". gpu_bytes, disk_bytes: what is free."""
    has_fp8 = tuple(map(int, capability.split("."))) >= FP8_CAPABILITY
    quantizations = {
        name: quantization
        for name, quantization in (QUANTIZATIONS | WITH_FP8_CACHE).items()
        if has_fp8 or not quantization.uses_fp8
    }
    like = largest_fit(gpu_bytes, disk_bytes)
    return [
        *(Case(dtype, "feature", dtype) for dtype in BOUNDS),
        *(Case(name, "feature", "float16", spec) for name, spec in FEATURES.items()),
        *(
            Case(name, "quantization", "float16", quantization=quantization)
            for name, quantization in quantizations.items()
        ),
        Case("mpt-demo, fp16", "demo", "float16"),
        Case("mpt-demo, int4", "demo", "float16", quantization=QUANTIZATIONS["int4_weight_only"]),
        *([Case(f"{like}, fp16, random weights", "random", "float16", like=like)] if like else []),
    ]


def largest_fit(gpu_bytes: int, disk_bytes: int) -> str:
    """The largest known model that fits in float16; an empty text if none does."""
    sizes = {}
    for name in SHAPES:
        config = known_config(name)
        spec = EngineSpec(config, "float16", 1, SPEED_LIMITS, VocabularySharding())
        needed = gpu_memory(spec)
        if needed <= gpu_bytes and needed * DISK_FACTOR <= disk_bytes:
            sizes[name] = needed
    return max(sizes, key=lambda name: sizes[name]) if sizes else ""
