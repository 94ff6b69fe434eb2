"""GPU memory of an engine in bytes, computed before it is made.

Weights and KV cache are exact, activations an estimate. Imports neither NumPy nor ONNX, because
Snakemake's planning calls these functions for many engines.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping

from mpt_trt.engines.spec import EngineSpec
from mpt_trt.ft.layout import ft_file
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import Weight, block_matrices, weights
from mpt_trt.network.linear.specs import TensorSpec, layer_specs
from mpt_trt.quantization.schemes import Mixed

MIB = 1 << 20
GB = 10**9
FLOAT32_BYTES = 4

# Memory of common GPUs in 10^9 bytes: vendors count 2^30 bytes, but error correction and the driver
# take a part.
GPU_CLASSES_GB = (16, 24, 40, 48, 80)
# Allowance for the CUDA context and the workspaces of TensorRT and NCCL; not measured.
GPU_OVERHEAD = 1024 * MIB


@functools.cache
def rank_weights(spec: EngineSpec) -> int:
    """Exact size of rank 0's weights; no rank has more."""
    tables = {"wte", "lm_head.weight"}
    read = [w for w in weights(spec.config) if w.name not in tables and _is_read(w)]
    elements = sum(math.prod(_rank_shape(spec, weight)) for weight in read if not weight.is_linear)
    if spec.config.qk_ln and spec.tp_size > 1:
        elements -= _qk_norm_elements_of_others(spec.config, spec.tp_size)
    return matrix_bytes(spec) + spec.element_bytes * elements + vocabulary_bytes(spec)


def _rank_shape(spec: EngineSpec, weight: Weight) -> tuple[int, ...]:
    return ft_file(spec.config, weight, Rank(0, spec.tp_size), spec.dtype).shape


@functools.cache
def matrix_bytes(spec: EngineSpec) -> int:
    """Size of a rank's matrices of all blocks, with their scales."""
    return sum(matrix_bytes_by_dtype(spec).values())


@functools.cache
def matrix_bytes_by_dtype(spec: EngineSpec) -> Mapping[str, int]:
    """The same by type of tensor."""
    scheme, num_layers = spec.quantization.scheme, spec.config.num_layers
    # Blocks are alike, unless calibration has chosen the format of each matrix.
    is_alike = not (isinstance(scheme, Mixed) and scheme.formats)
    layers, times = (range(1), num_layers) if is_alike else (range(num_layers), 1)
    sizes: Counter[str] = Counter()
    for layer in layers:
        for tensor in _block_tensors(spec, layer):
            sizes[tensor.dtype] += times * tensor.byte_size
    return sizes


def _block_tensors(spec: EngineSpec, layer: int) -> list[TensorSpec]:
    """Tensors that a rank's network stores for the matrices of a block."""
    rank = Rank(0, spec.tp_size)
    return [
        tensor
        for weight in block_matrices(spec.config, layer).values()
        for tensor in layer_specs(spec.config, weight, rank, spec.dtype, spec.quantization).values()
    ]


def _is_read(weight: Weight) -> bool:
    # FT has files of zeros for norms without a bias; engines do not read them.
    return weight.hf_name is not None


def _qk_norm_elements_of_others(config: MptConfig, tp_size: int) -> int:
    """Number of elements of the query and key norms that are only on other ranks."""
    query, key, _ = sharding.qkv_columns(config, Rank(0, tp_size))
    others = config.hidden_size - len(query) + config.kv_size - len(key)
    return others * config.num_layers * (2 if config.bias else 1)


def vocabulary_bytes(spec: EngineSpec) -> int:
    """Size of a rank's embedding and head, which are one table if they have the same rows."""
    config, is_alone = spec.config, spec.tp_size == 1
    head = "embedding" if config.tie_word_embeddings else "head"
    tables = {
        ("embedding", spec.vocabulary.embedding and not is_alone),
        (head, spec.vocabulary.head and not is_alone),
    }
    part = sharding.vocabulary_width(config, spec.tp_size)
    rows = sum(part if is_sharded else config.vocab_size for _, is_sharded in tables)
    if spec.quantization.head == "int8":
        return rows * (config.hidden_size + spec.element_bytes)
    return rows * config.hidden_size * spec.element_bytes


def kv_cache(spec: EngineSpec) -> int:
    """Exact size of a rank's KV cache for all rows; beam search has two."""
    is_quantized = spec.quantization.kv_cache != "auto"
    return _cache_elements(spec) * (1 if is_quantized else spec.element_bytes)


def _cache_elements(spec: EngineSpec) -> int:
    kv_heads = len(sharding.kv_heads(spec.config, Rank(0, spec.tp_size)))
    positions = spec.limits.max_batch_size * spec.limits.cache_len
    features = 2 * spec.config.num_layers * kv_heads * spec.config.head_dim
    return positions * features


def activations(spec: EngineSpec) -> int:
    """Estimates the memory for a rank's values during one step; not measured on a GPU.

    With T = max_batch_size * max_input_len tokens and the rank's heads and columns, it is the sum
    of the first two of these numbers of elements and the largest of the others:

        attention bias  T * cache_len * heads (one head without ALiBi), which all layers share
        residual        3 * T * hidden: itself, its norm, a layer's output

        bias            the attention bias in float32, before it is rounded
        attention       2 * T * (Q + K + V columns), and 3 * T * cache_len * heads for the scores in
                        float32, for which TensorRT has no fused attention
        feed-forward    2 * T * columns: before and after GELU
        head            logits * vocab: the product, and in float32 the logits, twice
        8-bit cache     the dequantized keys and values of one layer
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
    """Memory that a rank needs on its GPU."""
    return rank_weights(spec) + kv_cache(spec) + activations(spec) + GPU_OVERHEAD


def gpu_class(spec: EngineSpec) -> int | None:
    """The smallest of GPU_CLASSES_GB that holds a rank; None if all are too small."""
    needed = gpu_memory(spec)
    return next((size for size in GPU_CLASSES_GB if size * GB >= needed), None)


def gpus_in_words(spec: EngineSpec) -> str:
    """The GPUs that an engine needs, in words: `4 GPUs of 40 GB`."""
    number = "1 GPU" if spec.tp_size == 1 else f"{spec.tp_size} GPUs"
    size = gpu_class(spec)
    return f"{number} of {f'more than {GPU_CLASSES_GB[-1]}' if size is None else size} GB"


def gpu_obstacle(spec: EngineSpec, available: int) -> str | None:
    """Reason why a GPU with `available` bytes cannot hold a rank; None if it can.

    Counts only weights and KV cache, so that an estimate never leads to a rejection.
    """
    needed = rank_weights(spec) + kv_cache(spec)
    if needed <= available:
        return None
    return (
        f"weights and KV cache of a rank take {needed / GB:.1f} GB, this GPU has "
        f"{available / GB:.1f} GB; this needs {gpus_in_words(spec)}"
    )
