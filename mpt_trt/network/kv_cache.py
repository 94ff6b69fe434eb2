"""KV cache of the network, in the network's type or with one byte per element.

Both kinds have the inputs `past_key.{layer}` and `past_value.{layer}` of shape
`[batch, kv_heads, cache_len, head_dim]` for every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from onnx import TensorProto

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Rank
from mpt_trt.network.graph import GraphBuilder
from mpt_trt.quantization.calibrated_weights import FP8_MAX, INT8_MAX, KvAmax
from mpt_trt.quantization.schemes import KvCacheType

KINDS = ("key", "value")
# Greater than any position, but differences of two such numbers do not overflow.
NEVER = 1 << 30
# ONNX type of a quantized cache, and its largest number.
QUANTIZED_TYPES = {"int8": (TensorProto.INT8, INT8_MAX), "fp8": (TensorProto.FLOAT8E4M3FN, FP8_MAX)}


@dataclass(frozen=True)
class CacheShape:
    """Shape of one rank's cache; kv_heads is the rank's number of K/V heads."""

    num_layers: int
    num_kv_heads: int
    cache_len: int
    head_dim: int


def cache_shape(config: MptConfig, rank: Rank, cache_len: int) -> CacheShape:
    """Shape of a rank's cache."""
    kv_heads = len(sharding.kv_heads(config, rank))
    return CacheShape(config.num_layers, kv_heads, cache_len, config.head_dim)


class Cache(Protocol):
    """Interface between the decoder and a cache."""

    @property
    def shape(self) -> CacheShape: ...

    def add_inputs(self, graph: GraphBuilder) -> None: ...

    def key_positions(self, graph: GraphBuilder, query_positions: str) -> str:
        """Returns the position of every key from `update`, int64 `[keys]` or `[batch, 1, 1, keys]`.

        query_positions: int64 `[batch, seq]`. Unused keys have a position greater than any.
        """
        ...

    def update(self, graph: GraphBuilder, layer: int, kind: str, new: str) -> str:
        """Stores the step's keys or values; returns all of them.

        new: `[batch, kv_heads, seq, head_dim]`. kind: one of KINDS.
        """
        ...

    def add_outputs(self, graph: GraphBuilder) -> None: ...


@dataclass(frozen=True)
class InPlaceCache:
    """Cache that is updated in place, so past and present values share one buffer."""

    shape: CacheShape

    def add_inputs(self, graph: GraphBuilder) -> None:
        for name in cache_names("past", self.shape.num_layers):
            graph.input(name, graph.element_type, _buffer_shape(self.shape))

    def key_positions(self, graph: GraphBuilder, query_positions: str) -> str:
        return _buffer_positions(graph)

    def update(self, graph: GraphBuilder, layer: int, kind: str, new: str) -> str:
        inputs = [f"past_{kind}.{layer}", new, "write_positions"]
        return graph.node("TensorScatter", inputs, f"present_{kind}.{layer}", axis=-2)

    def add_outputs(self, graph: GraphBuilder) -> None:
        for name in cache_names("present", self.shape.num_layers):
            graph.output(name, graph.element_type, _buffer_shape(self.shape))


@dataclass(frozen=True)
class CopiedCache:
    """Cache with one byte per element; the caller copies `new_{kind}.{layer}` into the buffer.

    TensorRT's in-place cache does not support 8-bit types, and no other operator writes in place in
    both runtimes. So the network does not write to the cache: it attends to the buffer as it was
    before the step and to the step's own keys and values, rounded as they will be read back later.

    amax: amax of keys and of values, by layer.
    """

    shape: CacheShape
    type: KvCacheType
    amax: tuple[KvAmax, ...]

    def add_inputs(self, graph: GraphBuilder) -> None:
        for name in cache_names("past", self.shape.num_layers):
            graph.input(name, QUANTIZED_TYPES[self.type][0], _buffer_shape(self.shape))

    def key_positions(self, graph: GraphBuilder, query_positions: str) -> str:
        positions = _buffer_positions(graph)
        axis = graph.constant("axis_1", [1], np.int64)
        first = graph.node("Unsqueeze", ["write_positions", axis], "cache/first_positions")
        is_written = graph.node("Less", [positions, first], "cache/is_written")
        never = graph.constant("cache/never", NEVER, np.int64)
        held = graph.node("Where", [is_written, positions, never], "cache/held_positions")
        every = graph.node("Concat", [held, query_positions], "cache/all_positions", axis=1)
        axes = graph.constant("axes_1_2", [1, 2], np.int64)
        return graph.node("Unsqueeze", [every, axes], "cache/positions_of_keys")

    def update(self, graph: GraphBuilder, layer: int, kind: str, new: str) -> str:
        quantized_type, largest = QUANTIZED_TYPES[self.type]
        name = f"layers.{layer}.attention/{kind}"
        amax = getattr(self.amax[layer], kind) or 1.0
        # float32, because a float16 scale would make ONNX Runtime divide in float16.
        scale = graph.constant(f"{name}_scale", amax / largest, np.float32)
        output = f"new_{kind}.{layer}"
        graph.node("QuantizeLinear", [new, scale], output, output_dtype=quantized_type)
        old, new = (
            graph.node(
                "DequantizeLinear",
                [part, scale],
                f"{name}_{age}",
                output_dtype=graph.element_type,
            )
            for age, part in (("old", f"past_{kind}.{layer}"), ("new", output))
        )
        return graph.node("Concat", [old, new], f"{name}_all", axis=2)

    def add_outputs(self, graph: GraphBuilder) -> None:
        shape: list[str | int] = ["batch", self.shape.num_kv_heads, "seq", self.shape.head_dim]
        for name in cache_names("new", self.shape.num_layers):
            graph.output(name, QUANTIZED_TYPES[self.type][0], shape)


def make_cache(shape: CacheShape, calibrated: CalibratedQuantization) -> Cache:
    """Makes the cache of a quantization."""
    cache_type, calibration = calibrated.quantization.kv_cache, calibrated.calibration
    if cache_type == "auto" or calibration is None:
        return InPlaceCache(shape)
    amax = tuple(calibration.kv_amax(layer) for layer in range(shape.num_layers))
    return CopiedCache(shape, cache_type, amax)


def cache_names(age: str, num_layers: int) -> list[str]:
    """Names of the network's cache values of one age (past, present, new), by layer, keys first."""
    return [f"{age}_{kind}.{layer}" for layer in range(num_layers) for kind in KINDS]


def _buffer_shape(shape: CacheShape) -> list[str | int]:
    return ["batch", shape.num_kv_heads, shape.cache_len, shape.head_dim]


def _buffer_positions(graph: GraphBuilder) -> str:
    """Adds the positions of a row of the buffer, int64 `[cache_len]`."""
    length = graph.node("Shape", ["past_key.0"], "bias/cache_shape", start=2, end=3)
    length = graph.node("Squeeze", [length], "bias/cache_len")
    return graph.node("Range", ["zero", length, "one"], "bias/key_positions")
