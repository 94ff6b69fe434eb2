"""What an engine needs, before it is made: disk, host memory, GPU memory (all in bytes), and time.

Pure functions of the architecture and of what is to be built. Sizes of files, of weights and of the
KV cache are exact; what is estimated says so. The measured figures are of
TensorRT-RTX 1.7, ONNX Runtime 1.32 and PyTorch 2.13 on Linux (docs/models.md).
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from mpt_trt.engines.spec import EngineSpec
from mpt_trt.ft.layout import Int8Layers, ft_file, ft_files
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import Split, Weight, block_matrices, weights
from mpt_trt.network.linear import NETWORK_WORKERS
from mpt_trt.network.linear.specs import TensorSpec, layer_specs
from mpt_trt.quantization.schemes import (
    CALIBRATION_BATCH_SIZE,
    Awq,
    Fp8,
    SmoothQuant,
    WeightOnly,
)

MIB = 1 << 20
GB = 10**9
FLOAT32_BYTES = 4

# Memory of common GPUs. A GPU counts with that many 10^9 bytes, since some of the 2^30 that vendors
# count are taken by error correction and by the driver.
GPU_CLASSES_GB = (16, 24, 40, 48, 80)
# Allowed for the CUDA context and the workspaces of TensorRT and NCCL; not measured.
GPU_OVERHEAD = 1024 * MIB

# What a plan holds beside the weights. Measured: 4 to 21 MiB with 4 to 24 layers.
PLAN_BASE = 4 * MIB
PLAN_PER_LAYER = MIB
# Measured: 1.17 x the weights at 2.6 GB and 1.04 x at 13 GB; of 0.2 GB, 0.6 GB in all. Two pieces
# of the plan, 64 MiB each, are held at a time. TensorRT unpacks 4-bit weights: 8.4 GB in all of
# MPT-7B, 2.4 GB of 1.3B.
BUILD_PER_WEIGHT = 1.2
BUILD_BASE = 700 * MIB
# A Python process, with PyTorch where it reads .bin files, and what a conversion worker holds.
# Measured with two workers: 95 MiB without PyTorch, which takes 140 MiB more; what the processes
# share is counted for each.
CONVERSION_BASE = 200 * MIB
CONVERSION_PER_WORKER = 48 * MIB
# Measured: 163 MiB.
NETWORK_BASE = 200 * MIB
# Of quantizing a matrix: its integers, two a byte, and as much again for what is read of it at a
# time. Measured in all: 174 MiB of MPT-7B in int4_awq, two matrices at a time.
NETWORK_PER_ELEMENT = 1
# A process with PyTorch and ModelOpt; most copies of a matrix or an activation that ModelOpt has at
# a time; hidden states of all samples: before a block, behind it, and once more of a second run.
# Measured, pages of mapped files included: 0.83 GB of the demo model, 1.38 GB of blocks of 0.2 GB.
CALIBRATION_BASE = 700 * MIB
CALIBRATION_COPIES = 6
CALIBRATION_STATES = 3
# A rank's process under ONNX Runtime, weights and cache aside. Measured: 0.34 GiB.
SMOKE_TEST_BASE = 450 * MIB
# A process with PyTorch and transformers. Measured: 0.43 GiB.
REFERENCE_BASE = 500 * MIB
# Logits of a step (see verification.LOGITS_BYTES), and what the network needs to compute them.
QUALITY_STEP = 1024 * MIB

# Time limits of jobs are allowances for slow machines, not forecasts: a job is ended when its limit
# is over. What a slow hub or a busy shared file system leaves one job, in bytes a second:
DOWNLOAD_RATE = 10**7
DISK_RATE = 5 * 10**7
# Building, beside reading and writing. Measured, of TensorRT-RTX: 4.2 s for 10^9 bytes.
BUILD_RATE = 2 * 10**7
# At which a processor reads weights while it generates.
CPU_RATE = 2 * 10**9
# Multiplications a second of a slow processor, and of a GPU; how often calibration computes all.
CPU_PRODUCTS = 10**10
GPU_PRODUCTS = 10**12
CALIBRATION_PASSES = 10
# Starting Python from a shared file system, and all else that does not grow with the model.
BASE_MINUTES = 10


# --- GPU -----------------------------------------------------------------------------------------


@functools.cache
def rank_weights(spec: EngineSpec) -> int:
    """Weights that a rank's engine holds; exact. No rank holds more than the first."""
    tables = {"wte", "lm_head.weight"}
    read = [w for w in weights(spec.config) if w.name not in tables and _is_read(w)]
    elements = sum(math.prod(_rank_shape(spec, weight)) for weight in read if not weight.is_linear)
    if spec.config.qk_ln and spec.tp_size > 1:
        elements -= _qk_norm_elements_of_others(spec.config, spec.tp_size)
    return _matrix_bytes(spec) + spec.element_bytes * (elements + _vocabulary_elements(spec))


def _rank_shape(spec: EngineSpec, weight: Weight) -> tuple[int, ...]:
    return ft_file(spec.config, weight, Rank(0, spec.tp_size), spec.dtype).shape


def _matrix_specs(spec: EngineSpec) -> list[TensorSpec]:
    """What a rank's network stores of a block's matrices."""
    rank = Rank(0, spec.tp_size)
    return [
        tensor
        for weight in block_matrices(spec.config, 0).values()
        for tensor in layer_specs(spec.config, weight, rank, spec.dtype, spec.quantization).values()
    ]


def _matrix_bytes(spec: EngineSpec) -> int:
    """The matrices of all blocks of a rank, with their scales."""
    return spec.config.num_layers * sum(tensor.byte_size for tensor in _matrix_specs(spec))


def _is_read(weight: Weight) -> bool:
    # The zeros that FT expects where a norm has no bias are files that no engine reads.
    return weight.hf_name is not None


def _qk_norm_elements_of_others(config: MptConfig, tp_size: int) -> int:
    """Features of the query and key norms that other ranks hold."""
    query, key, _ = sharding.qkv_columns(config, Rank(0, tp_size))
    others = config.hidden_size - len(query) + config.kv_size - len(key)
    return others * config.num_layers * (2 if config.bias else 1)


def _vocabulary_elements(spec: EngineSpec) -> int:
    """Of the embedding and the head, which are one table only if both hold the same rows of it."""
    config, is_alone = spec.config, spec.tp_size == 1
    head = "embedding" if config.tie_word_embeddings else "head"
    tables = {
        ("embedding", spec.vocabulary.embedding and not is_alone),
        (head, spec.vocabulary.head and not is_alone),
    }
    part = sharding.vocabulary_width(config, spec.tp_size)
    rows = sum(part if is_sharded else config.vocab_size for _, is_sharded in tables)
    return rows * config.hidden_size


def kv_cache(spec: EngineSpec) -> int:
    """Keys and values of a rank for all rows; exact. Beam search holds it twice for a moment."""
    is_quantized = spec.quantization.kv_cache != "auto"
    return _cache_elements(spec) * (1 if is_quantized else spec.element_bytes)


def _cache_elements(spec: EngineSpec) -> int:
    kv_heads = len(sharding.kv_heads(spec.config, Rank(0, spec.tp_size)))
    positions = spec.limits.max_batch_size * spec.limits.cache_len
    features = 2 * spec.config.num_layers * kv_heads * spec.config.head_dim
    return positions * features


def activations(spec: EngineSpec) -> int:
    """Most that a rank needs for the values of one step; an estimate, not measured on a GPU.

    With T = max_batch_size * max_input_len tokens and the rank's part of heads and columns, it is
    the first two of these numbers of elements and the largest of the others:

        attention bias  T * cache_len * heads (without ALiBi of one head), which all layers share
        residual        3 * T * hidden: it, its norm, a layer's output

        bias            the same once more, in float32, before it is rounded
        attention       2 * T * (Q + K + V columns), and in float32, for which TensorRT has no fused
                        attention, 3 * T * cache_len * heads for the scores
        feed-forward    2 * T * columns: before and after GELU
        head            logits * vocab: the product, and in float32 the logits, twice
        8-bit cache     the keys and values of one layer, as attention reads them
    """
    config, limits, rank = spec.config, spec.limits, Rank(0, spec.tp_size)
    layers = config.num_layers
    tokens = limits.max_batch_size * limits.max_input_len
    heads = len(sharding.query_heads(config, rank))
    scores = tokens * limits.cache_len * heads
    bias = scores if config.position_embedding == "alibi" else scores // heads
    qkv = sum(map(len, sharding.qkv_columns(config, rank)))
    wide = len(sharding.feed_forward_columns(config, rank))
    logits = limits.max_logits * config.vocab_size
    size = spec.element_bytes
    unfused_scores = 3 * scores * FLOAT32_BYTES if spec.dtype == "float32" else 0
    return size * (bias + 3 * tokens * config.hidden_size) + max(
        bias * FLOAT32_BYTES,
        2 * tokens * qkv * size + unfused_scores,
        2 * tokens * wide * size,
        logits * (size + 2 * FLOAT32_BYTES),
        0 if spec.quantization.kv_cache == "auto" else size * _cache_elements(spec) // layers,
    )


def gpu_memory(spec: EngineSpec) -> int:
    """What a rank takes of its GPU."""
    return rank_weights(spec) + kv_cache(spec) + activations(spec) + GPU_OVERHEAD


def gpu_class(spec: EngineSpec) -> int | None:
    """The smallest of GPU_CLASSES_GB that holds a rank; None when none does."""
    needed = gpu_memory(spec)
    return next((size for size in GPU_CLASSES_GB if size * GB >= needed), None)


def gpus_in_words(spec: EngineSpec) -> str:
    """For messages: `4 GPUs of 40 GB`."""
    number = "1 GPU" if spec.tp_size == 1 else f"{spec.tp_size} GPUs"
    size = gpu_class(spec)
    return f"{number} of {f'more than {GPU_CLASSES_GB[-1]}' if size is None else size} GB"


def gpu_obstacle(spec: EngineSpec, available: int) -> str | None:
    """Why a GPU of `available` bytes cannot hold a rank; None when it can.

    Counts what is exact, weights and KV cache, so that nothing is refused because of an estimate.
    """
    needed = rank_weights(spec) + kv_cache(spec)
    if needed <= available:
        return None
    return (
        f"weights and KV cache of a rank take {needed / GB:.1f} GB, this GPU has "
        f"{available / GB:.1f} GB; this needs {gpus_in_words(spec)}"
    )


# --- disk ----------------------------------------------------------------------------------------


def ft_checkpoint_disk(spec: EngineSpec) -> int:
    """All `.bin` files of the FT checkpoint; exact. config.ini and manifest.json are small."""
    is_smoothed = isinstance(spec.scheme, SmoothQuant)
    int8_layers = Int8Layers.ALL if is_smoothed else Int8Layers.NONE
    return _ft_bytes(spec.config, spec.tp_size, spec.dtype, int8_layers)


@functools.cache
def _ft_bytes(
    config: MptConfig, tp_size: int, storage_type: str, int8_layers: Int8Layers = Int8Layers.NONE
) -> int:
    return sum(file.byte_size for file in ft_files(config, tp_size, storage_type, int8_layers))


def engine_disk(spec: EngineSpec) -> int:
    """What an engine directory adds: the plans, and the matrices that its network quantizes.

    All other weights are links to the FT checkpoint.
    """
    plan = rank_weights(spec) + PLAN_BASE + spec.config.num_layers * PLAN_PER_LAYER
    made = 0
    if isinstance(spec.scheme, WeightOnly | Awq | Fp8):
        made = _matrix_bytes(spec)
    return spec.tp_size * (plan + made)


# --- host memory ---------------------------------------------------------------------------------


def conversion_memory(workers: int) -> int:
    """Of convert_hf_mpt_to_ft.py. It streams: the model's size does not matter."""
    return CONVERSION_BASE + workers * CONVERSION_PER_WORKER


def calibration_memory(config: MptConfig, num_samples: int, sequence_length: int) -> int:
    """Of quantize.py on the CPU; an estimate. The number of blocks does not matter.

    A block in float32 with copies of its largest matrix, or the embedding twice; the hidden states
    of all samples; and what the feed-forward layer makes of a batch of them.
    """
    matrices = [math.prod(w.shape) for w in block_matrices(config, 0).values()]
    block = sum(matrices) + CALIBRATION_COPIES * max(matrices)
    embedding = 2 * config.vocab_size * config.hidden_size
    tokens = num_samples * sequence_length
    states = CALIBRATION_STATES * tokens * config.hidden_size
    batch = min(num_samples, CALIBRATION_BATCH_SIZE) * sequence_length
    wide = CALIBRATION_COPIES * batch * config.intermediate_size
    return CALIBRATION_BASE + FLOAT32_BYTES * (max(block, embedding) + states + wide)


def network_memory(spec: EngineSpec) -> int:
    """Of make_networks.py: weights are linked, or quantized one matrix a worker.

    SmoothQuant's integers are linked, too.
    """
    if isinstance(spec.scheme, SmoothQuant | None):
        return NETWORK_BASE
    largest = max(math.prod(weight.shape) for weight in weights(spec.config) if weight.is_linear)
    return NETWORK_BASE + NETWORK_WORKERS * NETWORK_PER_ELEMENT * largest


def linking_memory() -> int:
    """Of the tools that fetch or link files."""
    return NETWORK_BASE


def build_memory(spec: EngineSpec) -> int:
    """Of building one rank's plan ahead of time."""
    unpacked = rank_weights(spec) + _unpacked_bytes(spec)
    return math.ceil(BUILD_PER_WEIGHT * unpacked) + BUILD_BASE


def _unpacked_bytes(spec: EngineSpec) -> int:
    """What 4-bit weights take beyond their packed size when each has a byte."""
    packed = sum(tensor.byte_size for tensor in _matrix_specs(spec) if tensor.dtype == "int4")
    return spec.config.num_layers * packed


def smoke_test_memory(spec: EngineSpec, num_nodes: int = 1) -> int:
    """Of a smoke test under ONNX Runtime on the CPU, for each of the nodes; an estimate.

    The ranks divide evenly among the nodes.
    """
    ranks = spec.tp_size // num_nodes * _onnx_runtime_memory(spec, 1)
    return ranks + _reference_memory(spec.config)


def reference_memory(config: MptConfig, num_windows: int, window_length: int) -> int:
    """Of computing the reference on held-out text; an estimate.

    Beside a block: three times what it gives for every token, and of one window the scores of
    attention and the widest values, three times each.
    """
    values = num_windows * window_length * config.hidden_size
    values += window_length * (config.num_heads * window_length + config.intermediate_size)
    return REFERENCE_BASE + _reference_memory(config) + 3 * values * FLOAT32_BYTES


def quality_memory(spec: EngineSpec, num_windows: int, window_length: int) -> int:
    """Of measuring an engine's quality under ONNX Runtime, all ranks on one machine; an estimate.

    The first rank has the reference's head, what it reads, and logits of both beside the engine.
    """
    hidden = num_windows * window_length * spec.config.hidden_size * FLOAT32_BYTES
    head = spec.config.vocab_size * spec.config.hidden_size * FLOAT32_BYTES
    ranks = spec.tp_size * _onnx_runtime_memory(spec, spec.limits.max_batch_size)
    return ranks + head + hidden + QUALITY_STEP


def _onnx_runtime_memory(spec: EngineSpec, rows: int) -> int:
    """A rank with `rows` rows of its cache.

    ONNX Runtime computes in float32 on the CPU. Of bfloat16 networks it holds the weights twice; of
    quantized ones, too, the second time in the order that its kernels want.
    """
    in_float32 = replace(spec, dtype="float32")
    is_quantized = spec.scheme is not None
    copies = 2 if spec.dtype == "bfloat16" or is_quantized else 1
    cache = rows * kv_cache(in_float32) // spec.limits.max_batch_size
    return math.ceil(1.1 * copies * rank_weights(in_float32)) + cache + SMOKE_TEST_BASE


def _reference_memory(config: MptConfig) -> int:
    """One block, the embedding and the head, in float32; see mpt_trt.evaluation.reference."""
    block = sum(math.prod(w.shape) for w in weights(replace(config, num_layers=1)))
    return block * FLOAT32_BYTES


# --- time ----------------------------------------------------------------------------------------


def fetch_minutes(config: MptConfig) -> int:
    """For a download of 16-bit weights."""
    return _minutes(_ft_bytes(config, 1, "float16") / DOWNLOAD_RATE)


def conversion_minutes(config: MptConfig, storage_type: str, tp_size: int) -> int:
    """For a checkpoint in float32, the largest there is."""
    read = _ft_bytes(config, 1, "float32")
    return _minutes((read + _ft_bytes(config, tp_size, storage_type)) / DISK_RATE)


def network_minutes(spec: EngineSpec) -> int:
    """For all ranks. Weights are linked, or read, quantized and written.

    A rank of an integer type without groups reads the whole of each matrix of which it holds rows.
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
    """For the plan of one rank."""
    weights = rank_weights(spec)
    return _minutes(2 * weights / DISK_RATE + weights / BUILD_RATE)


def collect_minutes(spec: EngineSpec) -> int:
    """The files are linked, or copied where a file system cannot link."""
    return _minutes(2 * engine_disk(spec) / DISK_RATE)


def calibration_minutes(config: MptConfig, num_tokens: int, on_gpu: bool) -> int:
    """For a search that runs the model many times over; not measured with large models."""
    rate = GPU_PRODUCTS if on_gpu else CPU_PRODUCTS
    reading = _ft_bytes(config, 1, "float32") / DISK_RATE
    return _minutes(reading + CALIBRATION_PASSES * _products(config) * num_tokens / rate)


def forward_minutes(config: MptConfig, num_tokens: int) -> int:
    """For reading a checkpoint and computing num_tokens positions on the CPU."""
    reading = _ft_bytes(config, 1, "float32") / DISK_RATE
    return _minutes(reading + _products(config) * num_tokens / CPU_PRODUCTS)


def quality_minutes(spec: EngineSpec, num_tokens: int) -> int:
    """For loading an engine and computing num_tokens positions on the CPU."""
    loading = spec.tp_size * rank_weights(spec) / DISK_RATE
    return _minutes(loading + _products(spec.config) * num_tokens / CPU_PRODUCTS)


def _products(config: MptConfig) -> int:
    """Multiplications of a position: about one a weight."""
    return _ft_bytes(config, 1, "float32") // FLOAT32_BYTES


def smoke_test_minutes(spec: EngineSpec, num_tokens: int) -> int:
    """For loading, num_tokens steps on the CPU, and the reference, which reads all weights."""
    computed = spec.tp_size * rank_weights(replace(spec, dtype="float32"))
    reference = _ft_bytes(spec.config, 1, "float32")
    loading = (spec.tp_size * rank_weights(spec) + reference) / DISK_RATE
    return _minutes(loading + num_tokens * computed / CPU_RATE)


def _minutes(seconds: float) -> int:
    return BASE_MINUTES + math.ceil(seconds / 60)
