"""The KV cache of the network: in the network's own type, or with one byte per element.

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
# Greater than any position, and small enough for differences of two.
NEVER = 1 << 30
# ONNX's type of a quantized cache, and the largest number that it holds.
QUANTIZED_TYPES = {"int8": (TensorProto.INT8, INT8_MAX), "fp8": (TensorProto.FLOAT8E4M3FN, FP8_MAX)}


@dataclass(frozen=True)
class CacheShape:
    """Of one rank; kv_heads are the rank's."""

    num_layers: int
    num_kv_heads: int
    cache_len: int
    head_dim: int


def cache_shape(config: MptConfig, rank: Rank, cache_len: int) -> CacheShape:
    """The cache of a rank."""
    kv_heads = len(sharding.kv_heads(config, rank))
    return CacheShape(config.num_layers, kv_heads, cache_len, config.head_dim)


class Cache(Protocol):
    """What the decoder asks of a cache."""

    @property
    def shape(self) -> CacheShape: ...

    def add_inputs(self, graph: GraphBuilder) -> None: ...

    def key_positions(self, graph: GraphBuilder, query_positions: str) -> str:
        """Position of every key that `update` returns, int64, `[keys]` or `[batch, 1, 1, keys]`.

        query_positions: int64 `[batch, seq]`. Keys that are no one's have a position beyond any.
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
    """Updated in place: `present_{kind}.{layer}` is the buffer of `past_{kind}.{layer}`."""

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
    """One byte an element; the caller copies `new_{kind}.{layer}` into the buffer after the step.

    TensorRT's in-place cache takes no 8-bit types, and no other operator writes in place in both
    runtimes. So the network does not write at all: it attends to what the buffer held before the
    step and, after it, to the step's own keys and values as they will be read back later.

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
        # In float32: a float16 scale would make ONNX Runtime divide in float16.
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
    """The cache that a quantization asks for."""
    cache_type, calibration = calibrated.quantization.kv_cache, calibrated.calibration
    if cache_type == "auto" or calibration is None:
        return InPlaceCache(shape)
    amax = tuple(calibration.kv_amax(layer) for layer in range(shape.num_layers))
    return CopiedCache(shape, cache_type, amax)


def cache_names(age: str, num_layers: int) -> list[str]:
    """The network's values of one age (past, present, new), by layer, keys before values."""
    return [f"{age}_{kind}.{layer}" for layer in range(num_layers) for kind in KINDS]


def _buffer_shape(shape: CacheShape) -> list[str | int]:
    return ["batch", shape.num_kv_heads, shape.cache_len, shape.head_dim]


def _buffer_positions(graph: GraphBuilder) -> str:
    """The positions of a row of the buffer, int64 `[cache_len]`."""
    length = graph.node("Shape", ["past_key.0"], "bias/cache_shape", start=2, end=3)
    length = graph.node("Squeeze", [length], "bias/cache_len")
    return graph.node("Range", ["zero", length, "one"], "bias/key_positions")
