"""A result of a smoke test."""

from __future__ import annotations

from mpt_trt.engines.spec import BuilderInfo
from mpt_trt.evaluation.distance import Distance, Tolerance
from mpt_trt.evaluation.smoke_result import SmokeResult
from mpt_trt.evaluation.speed import Speed

PASSED = SmokeResult(
    engine_dir="engine",
    engines=("rank0.engine",),
    builder=BuilderInfo("tensorrt", "10", ("8.9",)),
    ranks=1,
    dtype="float16",
    quantization={"method": "int4_weight_only", "group_size": 64},
    kv_cache="auto",
    runtime="ONNX Runtime",
    fallback_reason=None,
    prompt="to",
    text=" be",
    tokens=(1, 2),
    prompt_len=1,
    speed=Speed.of_rounds([1.0, 3.0, 2.0], [4.0, 5.0, 6.0]),
    reference="PyTorch",
    distance=Distance(0.1, 0.1, 0.001, 0.01, 1.0, 0.0, 1.0, 2),
    tolerance=Tolerance(1.0, 0.9),
)
