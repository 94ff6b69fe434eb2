"""Show the disk space, host memory and GPU memory that an engine needs."""

from __future__ import annotations

import argparse

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.known_models import known_config
from mpt_trt.cli import options as cli_options
from mpt_trt.engines import memory
from mpt_trt.engines.memory import GB
from mpt_trt.engines.spec import EngineSpec
from mpt_trt.model.sharding import VocabularySharding
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
        VocabularySharding(options.shard_embedding, options.shard_head),
    )
    print(f"{options.like or options.model_dir}, {spec.dtype}: {memory.gpus_in_words(spec)}")
    for name, size in parts(spec).items():
        print(f"  {name:44}{size / GB:9.2f} GB")


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
