"""Disk space and host memory (bytes) and time (minutes) of the workflow's jobs.

Sizes of files are exact, other values estimates. Measured with TensorRT-RTX 1.7, ONNX Runtime 1.32
and PyTorch 2.13 on Linux (docs/requirements.md).
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from mpt_trt.calibration.defaults import BATCH_SIZE
from mpt_trt.engines import memory
from mpt_trt.engines.memory import FLOAT32_BYTES, MIB
from mpt_trt.engines.spec import EngineSpec
from mpt_trt.ft.layout import Int8Layers, ft_files
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import BlockMatrix, Split, block_matrices, weights
from mpt_trt.network.linear import NETWORK_WORKERS
from mpt_trt.quantization.schemes import (
    MIXED_STRIDE,
    ROUNDED,
    Awq,
    Fp8,
    Gptq,
    Mixed,
    QuantizationFormat,
    SmoothQuant,
    WeightOnly,
    mixed_candidates,
)

# Size of a plan without its weights. Measured: 4 to 21 MiB with 4 to 24 layers.
PLAN_BASE = 4 * MIB
PLAN_PER_LAYER = MIB
# Host memory of a build. Measured: 1.17 x the weights at 2.6 GB and 1.04 x at 13 GB; 0.6 GB in all
# for 0.2 GB of weights. It includes two pieces of the plan of 64 MiB each. TensorRT expands 4-bit
# weights: 8.4 GB in all for MPT-7B, 2.4 GB for 1.3B.
BUILD_PER_WEIGHT = 1.2
BUILD_BASE = 700 * MIB
# A Python process, with PyTorch if it reads .bin files, and the memory of a conversion worker.
# Measured with two workers: 95 MiB, and 140 MiB more with PyTorch; memory that the processes share
# is counted for each.
CONVERSION_BASE = 200 * MIB
CONVERSION_PER_WORKER = 48 * MIB
# Making a network without quantization. Measured: 163 MiB.
NETWORK_BASE = 200 * MIB
# Bytes per element of a matrix that is being quantized: half a byte for its 4-bit integers and the
# same for the part that is read. Measured: 174 MiB in all for MPT-7B in int4_awq, two at a time.
NETWORK_PER_ELEMENT = 1
# A process with PyTorch and ModelOpt; the maximum number of copies of a matrix or an activation
# that ModelOpt has at a time; the hidden states of all samples before a block, after it, and of a
# second run. Measured with pages of mapped files: 0.83 GB for the demo model, 1.38 GB for blocks of
# 0.2 GB.
CALIBRATION_BASE = 700 * MIB
CALIBRATION_COPIES = 6
CALIBRATION_STATES = 3
# Bytes per element of a Hessian that GPTQ factorizes: a copy that is kept, the Hessian itself, the
# identity that is solved for and a reordered copy in float64; the sum of shifts in float32.
HESSIAN_BYTES = 36
# A rank's process under ONNX Runtime, without weights and cache. Measured: 0.34 GiB.
SMOKE_TEST_BASE = 450 * MIB
# A process with PyTorch and transformers. Measured: 0.43 GiB.
REFERENCE_BASE = 500 * MIB
# Logits of a step, and the values that the network computes them from.
QUALITY_STEP = 1024 * MIB

# Time limits are for slow machines, because a scheduler ends jobs that exceed them. Bytes per
# second of a slow hub and of a busy shared file system for one job:
DOWNLOAD_RATE = 10**7
DISK_RATE = 5 * 10**7
# Bytes of weights that a builder processes per second, without reading and writing. Measured with
# TensorRT-RTX: 4.2 s for 10^9 bytes.
BUILD_RATE = 2 * 10**7
# Bytes of weights per second that a CPU reads while it generates.
CPU_RATE = 2 * 10**9
# Multiplications per second of a slow CPU and of a GPU, and the number of times that calibration
# computes the whole model.
CPU_PRODUCTS = 10**10
GPU_PRODUCTS = 10**12
CALIBRATION_PASSES = 10
# Number of times that GPTQ multiplies a matrix by one of the Hessian's size.
ROUNDING_PASSES = 6
# Further rounds of a speed measurement, which stops when it has taken that long.
ROUNDS_SECONDS = 120
# Starting Python from a shared file system, and other work that does not depend on the model.
BASE_MINUTES = 10


# --- disk ----------------------------------------------------------------------------------------


def ft_checkpoint_disk(spec: EngineSpec) -> int:
    """Exact size of the FT checkpoint's `.bin` files; its other files are small."""
    is_smoothed = isinstance(spec.scheme, SmoothQuant)
    int8_layers = Int8Layers.ALL if is_smoothed else Int8Layers.NONE
    return _ft_bytes(spec.config, spec.tp_size, spec.dtype, int8_layers)


@functools.cache
def _ft_bytes(
    config: MptConfig, tp_size: int, storage_type: str, int8_layers: Int8Layers = Int8Layers.NONE
) -> int:
    return sum(file.byte_size for file in ft_files(config, tp_size, storage_type, int8_layers))


def engine_disk(spec: EngineSpec) -> int:
    """Size of an engine directory: its plans, and the quantized matrices of its networks.

    All other weights are links to the FT checkpoint.
    """
    plan = memory.rank_weights(spec) + PLAN_BASE + spec.config.num_layers * PLAN_PER_LAYER
    quantized = 0
    if isinstance(spec.scheme, WeightOnly | Awq | Gptq | Mixed | Fp8):
        quantized = memory.matrix_bytes(spec)
    if spec.quantization.head != "auto":
        quantized += memory.vocabulary_bytes(spec)
    return spec.tp_size * (plan + quantized)


# --- host memory ---------------------------------------------------------------------------------


def conversion_memory(workers: int) -> int:
    """Host memory of a conversion, which streams the model, so its size does not matter."""
    return CONVERSION_BASE + workers * CONVERSION_PER_WORKER


def calibration_memory(
    config: MptConfig,
    quantization_format: QuantizationFormat,
    num_samples: int,
    sequence_length: int,
) -> int:
    """Estimates the host memory of a calibration on the CPU.

    It has a block in float32 with copies of its largest matrix, or the embedding twice; the hidden
    states of all samples; and the feed-forward layer's values for a batch of them. GPTQ also has
    the inputs of all matrices of a block, and the Hessian of the widest. Only for mixed does the
    number of blocks matter: hidden states of the model with each matrix in each format.
    """
    matrices = [math.prod(w.shape) for w in block_matrices(config, 0).values()]
    block = sum(matrices) + CALIBRATION_COPIES * max(matrices)
    embedding = 2 * config.vocab_size * config.hidden_size
    tokens = num_samples * sequence_length
    states = CALIBRATION_STATES * tokens * config.hidden_size
    batch = min(num_samples, BATCH_SIZE) * sequence_length
    wide = CALIBRATION_COPIES * batch * config.intermediate_size
    plain = CALIBRATION_BASE + FLOAT32_BYTES * (max(block, embedding) + states + wide)
    if quantization_format not in ROUNDED:
        return plain
    widths = [matrix.shape(config)[1] for matrix in BlockMatrix]
    inputs = FLOAT32_BYTES * (tokens * sum(widths) + CALIBRATION_COPIES * max(matrices))
    rounding = inputs + HESSIAN_BYTES * max(widths) ** 2
    if quantization_format != "mixed":
        return plain + rounding
    variants = config.num_layers * len(BlockMatrix) * len(mixed_candidates(config))
    hidden = FLOAT32_BYTES * variants * math.ceil(tokens / MIXED_STRIDE) * config.hidden_size
    return plain + rounding + hidden


def network_memory(spec: EngineSpec) -> int:
    """Host memory of making networks; each worker quantizes one matrix at a time.

    Unquantized weights and SmoothQuant's integers are links.
    """
    if isinstance(spec.scheme, SmoothQuant | None):
        return NETWORK_BASE
    largest = max(math.prod(weight.shape) for weight in weights(spec.config) if weight.is_linear)
    return NETWORK_BASE + NETWORK_WORKERS * NETWORK_PER_ELEMENT * largest


def linking_memory() -> int:
    """Host memory of commands that fetch or link files."""
    return NETWORK_BASE


def build_memory(spec: EngineSpec) -> int:
    """Host memory of building one rank's plan ahead of time."""
    # 4-bit weights are expanded to one byte each.
    unpacked = memory.rank_weights(spec) + memory.matrix_bytes_by_dtype(spec).get("int4", 0)
    return math.ceil(BUILD_PER_WEIGHT * unpacked) + BUILD_BASE


def smoke_test_memory(spec: EngineSpec, num_nodes: int = 1) -> int:
    """Estimates the host memory of a smoke test under ONNX Runtime on the CPU, per node.

    The ranks are divided evenly among the nodes.
    """
    ranks = spec.tp_size // num_nodes * _onnx_runtime_memory(spec, 1)
    # A block, the embedding and the head as stored, in the engine's type, and quantized.
    return ranks + 3 * _reference_memory(spec.config)


def reference_memory(config: MptConfig, num_windows: int, window_length: int) -> int:
    """Estimates the host memory of computing the reference on held-out text.

    Besides a block, it has three copies of the hidden states of every token and, for one window,
    three copies of attention's scores and of the widest values.
    """
    values = num_windows * window_length * config.hidden_size
    values += window_length * (config.num_heads * window_length + config.intermediate_size)
    return REFERENCE_BASE + _reference_memory(config) + 3 * values * FLOAT32_BYTES


def quality_memory(spec: EngineSpec, num_windows: int, window_length: int) -> int:
    """Estimates the host memory of measuring quality, with all ranks on one machine.

    Besides its engine, the first rank has the reference's head and hidden states, and the logits of
    both.
    """
    hidden = num_windows * window_length * spec.config.hidden_size * FLOAT32_BYTES
    head = spec.config.vocab_size * spec.config.hidden_size * FLOAT32_BYTES
    ranks = spec.tp_size * _onnx_runtime_memory(spec, spec.limits.max_batch_size)
    return ranks + head + hidden + QUALITY_STEP


def _onnx_runtime_memory(spec: EngineSpec, rows: int) -> int:
    """Host memory of a rank with `rows` rows in its cache.

    ONNX Runtime computes in float32 on the CPU. It has two copies of the weights of bfloat16 and
    quantized networks; the second copy of the latter is in the order of its kernels.
    """
    in_float32 = replace(spec, dtype="float32")
    is_quantized = spec.scheme is not None
    copies = 2 if spec.dtype == "bfloat16" or is_quantized else 1
    cache = rows * memory.kv_cache(in_float32) // spec.limits.max_batch_size
    return math.ceil(1.1 * copies * memory.rank_weights(in_float32)) + cache + SMOKE_TEST_BASE


def _reference_memory(config: MptConfig) -> int:
    """Size of one block, the embedding and the head in float32, for the reference."""
    block = sum(math.prod(w.shape) for w in weights(replace(config, num_layers=1)))
    return block * FLOAT32_BYTES


# --- time ----------------------------------------------------------------------------------------


def fetch_minutes(config: MptConfig) -> int:
    """Time limit of downloading 16-bit weights."""
    return _minutes(_ft_bytes(config, 1, "float16") / DOWNLOAD_RATE)


def conversion_minutes(config: MptConfig, storage_type: str, tp_size: int) -> int:
    """Time limit of converting a checkpoint in float32, the largest one."""
    read = _ft_bytes(config, 1, "float32")
    return _minutes((read + _ft_bytes(config, tp_size, storage_type)) / DISK_RATE)


def network_minutes(spec: EngineSpec) -> int:
    """Time limit of making all networks, which links weights or reads, quantizes and writes them.

    For integers without groups, each rank reads row-split matrices completely.
    """
    scheme = spec.scheme
    if scheme is None:
        return BASE_MINUTES
    size = 2 * _ft_bytes(spec.config, 1, spec.dtype)
    if isinstance(scheme, WeightOnly) and scheme.group_size is None:
        rows = [w for w in weights(spec.config) if w.is_linear and w.split is Split.ROWS]
        elements = sum(math.prod(weight.shape) for weight in rows)
        size += (spec.tp_size - 1) * elements * spec.element_bytes
    return _minutes(size / DISK_RATE)


def build_minutes(spec: EngineSpec) -> int:
    """Time limit of building the plan of one rank."""
    weights = memory.rank_weights(spec)
    return _minutes(2 * weights / DISK_RATE + weights / BUILD_RATE)


def collect_minutes(spec: EngineSpec) -> int:
    """Time limit of assembling an engine, whose files are copied if they cannot be linked."""
    return _minutes(2 * engine_disk(spec) / DISK_RATE)


def calibration_minutes(
    config: MptConfig, quantization_format: QuantizationFormat, num_tokens: int, on_gpu: bool
) -> int:
    """Time limit of a calibration, which runs the model many times.

    GPTQ also factorizes the Hessian of each matrix. For mixed, both are repeated for each format,
    and a model that differs from a block on runs from there on. Not measured for large models.
    """
    rate = GPU_PRODUCTS if on_gpu else CPU_PRODUCTS
    reading = _ft_bytes(config, 1, "float32") / DISK_RATE
    passes: float = CALIBRATION_PASSES
    rounding = 0
    if quantization_format in ROUNDED:
        shapes = [matrix.shape(config) for matrix in BlockMatrix]
        block = sum(width**3 + ROUNDING_PASSES * out * width**2 for out, width in shapes)
        rounding = config.num_layers * block
    if quantization_format == "mixed":
        formats = len(mixed_candidates(config))
        rounding *= 1 + formats
        passes += formats * len(BlockMatrix) * config.num_layers / 2 / MIXED_STRIDE
    computing = (passes * _products(config) * num_tokens + rounding) / rate
    return _minutes(reading + computing)


def forward_minutes(config: MptConfig, num_tokens: int) -> int:
    """Time limit of reading a checkpoint and computing num_tokens positions on the CPU."""
    reading = _ft_bytes(config, 1, "float32") / DISK_RATE
    return _minutes(reading + _products(config) * num_tokens / CPU_PRODUCTS)


def quality_minutes(spec: EngineSpec, num_tokens: int) -> int:
    """Time limit of loading an engine and computing num_tokens positions on the CPU."""
    loading = spec.tp_size * memory.rank_weights(spec) / DISK_RATE
    computing = _products(spec.config) * num_tokens / CPU_PRODUCTS
    return _minutes(loading + computing + 2 * ROUNDS_SECONDS)


def _products(config: MptConfig) -> int:
    """Multiplications per position: about one per weight."""
    return _ft_bytes(config, 1, "float32") // FLOAT32_BYTES


def smoke_test_minutes(spec: EngineSpec, num_tokens: int) -> int:
    """Time limit of loading, num_tokens steps on the CPU, and the reference, which loads again."""
    computed = spec.tp_size * memory.rank_weights(replace(spec, dtype="float32"))
    reference = _ft_bytes(spec.config, 1, "float32")
    loading = (spec.tp_size * memory.rank_weights(spec) + reference) / DISK_RATE
    return _minutes(loading + num_tokens * computed / CPU_RATE + ROUNDS_SECONDS)


def _minutes(seconds: float) -> int:
    return BASE_MINUTES + math.ceil(seconds / 60)
