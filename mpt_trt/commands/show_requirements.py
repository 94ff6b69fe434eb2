"""Show the disk space, host memory and GPU memory that an engine needs."""

from __future__ import annotations

import argparse

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.known_models import known_config
from mpt_trt.cli import options as cli_options
from mpt_trt.engines import memory
from mpt_trt.engines.memory import GB
from mpt_trt.engines.spec import EngineSpec
from mpt_trt.quantization.schemes import method_of
from mpt_trt.workflow import resources

WORKERS = 2


def run(options: argparse.Namespace) -> None:
    is_known = options.like is not None
    config = known_config(options.like) if is_known else read_hf_config(options.model_dir)
    spec = EngineSpec(
        config,
        options.dtype,
        options.tensor_parallelism,
        cli_options.limits(options),
        cli_options.vocabulary(options),
        cli_options.quantization(options),
    )
    name = f"{options.like or options.model_dir}, {_stored_in(spec)}"
    print(f"{name}: {memory.gpus_in_words(spec)}")
    for name, size in parts(spec).items():
        print(f"  {name:44}{size / GB:9.2f} GB")


def _stored_in(spec: EngineSpec) -> str:
    """Types of an engine's weights and cache."""
    quantization = spec.quantization
    method = "" if spec.scheme is None else f", {method_of(spec.scheme)}"
    head = "" if quantization.head == "auto" else f", head {quantization.head}"
    cache = "" if quantization.kv_cache == "auto" else f", cache {quantization.kv_cache}"
    return f"{spec.dtype}{method}{head}{cache}"


def parts(spec: EngineSpec) -> dict[str, int]:
    """Computes all sizes of an engine, in bytes."""
    return {
        "disk, FT checkpoint": resources.ft_checkpoint_disk(spec),
        "disk, engine directory": resources.engine_disk(spec),
        f"host memory, conversion ({WORKERS} workers)": resources.conversion_memory(WORKERS),
        "host memory, build of a rank": resources.build_memory(spec),
        "host memory, smoke test on the CPU": resources.smoke_test_memory(spec),
        "GPU memory of a rank": memory.gpu_memory(spec),
        "  weights": memory.rank_weights(spec),
        "  KV cache": memory.kv_cache(spec),
        "  activations (estimate)": memory.activations(spec),
        "  CUDA and libraries (allowance)": memory.GPU_OVERHEAD,
    }
