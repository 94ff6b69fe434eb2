"""Attention of one rank: its heads, the KV cache and the bias of the scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig, alibi_slopes
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import BlockMatrices, BlockMatrix, Weight
from mpt_trt.network.graph import GraphBuilder
from mpt_trt.network.kv_cache import KINDS, Cache
from mpt_trt.network.linear.base import LinearLayers
from mpt_trt.network.linear.biased import emit_linear, emit_row_split_linear
from mpt_trt.network.norms import QueryKeyNorms, emit_norm_before
from mpt_trt.network.rotary import RotatedHeads, Rotation, emit_rotation


@dataclass(frozen=True)
class Attention:
    """Emits the attention layers of a rank."""

    graph: GraphBuilder
    config: MptConfig
    rank: Rank
    linear_layers: LinearLayers
    cache: Cache

    @property
    def num_heads(self) -> int:
        """Number of the rank's query heads."""
        return len(sharding.query_heads(self.config, self.rank))

    @property
    def num_kv_heads(self) -> int:
        """Number of the rank's key/value heads."""
        return len(sharding.kv_heads(self.config, self.rank))

    def emit_bias(self, query_positions: str) -> str:
        """Adds the bias of attention's scores, `[batch, heads or 1, seq, keys]`.

        It is ALiBi's slope times the (negative) distance to the key, and -inf for keys after the
        query. The distance is computed before rounding to the network's type, which cannot
        represent large positions.
        """
        graph = self.graph
        keys = self.cache.key_positions(graph, query_positions)
        axes = graph.constant("axes_1_3", [1, 3], np.int64)
        queries = graph.node("Unsqueeze", [query_positions, axes], "bias/query_positions")
        distance = graph.node("Sub", [keys, queries], "bias/distance")
        visible = graph.node("LessOrEqual", [distance, "zero"], "bias/visible")
        hidden = graph.constant("minus_infinity", -np.inf, np.float32)
        if self.config.position_embedding == "alibi":
            distance = graph.node("Cast", [distance], "bias/distance_float", to=TensorProto.FLOAT)
            slopes = alibi_slopes(self.config.num_heads, self.config.alibi_bias_max)
            heads = sharding.query_heads(self.config, self.rank)
            local = np.reshape(slopes[heads.start : heads.stop], (1, -1, 1, 1))
            slopes_name = graph.constant("alibi_slopes", local, np.float32)
            score = graph.node("Mul", [distance, slopes_name], "bias/alibi")
        else:
            score = graph.constant("no_bias", 0, np.float32)
        bias = graph.node("Where", [visible, score, hidden], "bias/masked")
        if graph.element_type == TensorProto.FLOAT:
            return bias
        return graph.node("Cast", [bias], "bias/attention_bias", to=graph.element_type)

    def emit_rotation(self, query_positions: str) -> Rotation | None:
        """Adds the rotation of queries and keys by position; None if the model has no rope."""
        rope, cache_len = self.config.rope, self.cache.shape.cache_len
        if rope is None:
            return None
        return emit_rotation(self.graph, rope, self.config.head_dim, cache_len, query_positions)

    def emit(
        self,
        layer: int,
        matrices: BlockMatrices,
        hidden: str,
        bias: str,
        rotation: Rotation | None,
    ) -> str:
        """Adds the attention of block `layer` and the residual, `[batch, seq, hidden]`.

        bias, rotation: the outputs of `emit_bias` and `emit_rotation`.
        """
        graph, name = self.graph, f"layers.{layer}.attention"
        packed = self._packed_query_key_value(name, matrices[BlockMatrix.QKV], hidden)
        if rotation is not None:
            num_rotated = self.num_heads + self.num_kv_heads
            rotated = RotatedHeads(num_rotated, self.num_kv_heads, self.config.head_dim)
            packed = rotated.emit(graph, name, packed, rotation)
        query, key, value = self._split_heads(name, packed)
        keys, values = (
            self.cache.update(graph, layer, kind, new)
            for kind, new in zip(KINDS, (key, value), strict=True)
        )
        context = graph.node(
            "Attention",
            [query, keys, values, bias],
            f"{name}/scaled_dot_product",
            scale=self.config.softmax_scale,
        )
        context = graph.node("Transpose", [context], f"{name}/transposed", perm=[0, 2, 1, 3])
        merged = graph.constant("merged_heads", [0, 0, -1], np.int64)
        context = graph.node("Reshape", [context, merged], f"{name}/merged")
        weight = matrices[BlockMatrix.OUTPUT]
        output = emit_row_split_linear(graph, self.linear_layers, weight, context)
        return graph.node("Add", [hidden, output], f"{name}/residual")

    def _packed_query_key_value(self, name: str, weight: Weight, hidden: str) -> str:
        """Adds the QKV projection with its clipping and norms, `[batch, seq, features]`."""
        graph = self.graph
        normed = emit_norm_before(graph, self.config, weight, hidden)
        packed = emit_linear(graph, self.linear_layers, weight, normed)
        if self.config.clip_qkv is not None:
            low = graph.scalar("clip_low", -self.config.clip_qkv)
            high = graph.scalar("clip_high", self.config.clip_qkv)
            packed = graph.node("Clip", [packed, low, high], f"{name}/clipped")
        if self.config.qk_ln:
            packed = self._normalize_query_and_key(name, packed)
        return packed

    def _split_heads(self, name: str, packed: str) -> tuple[str, str, str]:
        """Adds Q `[batch, heads, seq, head_dim]`, K and V `[batch, kv_heads, seq, head_dim]`."""
        graph = self.graph
        total = self.num_heads + 2 * self.num_kv_heads
        shape = graph.constant("split_heads", [0, 0, total, self.config.head_dim], np.int64)
        packed = graph.node("Reshape", [packed, shape], f"{name}/heads")
        packed = graph.node("Transpose", [packed], f"{name}/heads_first", perm=[0, 2, 1, 3])
        parts = [f"{name}/{part}" for part in ("query", "key", "value")]
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        graph.split(packed, parts, sizes, axis=1, name=f"{name}/split")
        return parts[0], parts[1], parts[2]

    def _normalize_query_and_key(self, name: str, packed: str) -> str:
        """Adds layer norms over all query features and over all key features of a token."""
        graph, head_dim = self.graph, self.config.head_dim
        parts = [f"{name}/flat_{part}" for part in ("query", "key", "value")]
        sizes = [n * head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        graph.split(packed, parts, sizes, axis=2, name=f"{name}/flat_split")
        norms = QueryKeyNorms(graph, self.config, self.rank)
        query, key = norms.emit(name, parts[0], parts[1])
        return graph.node("Concat", [query, key, parts[2]], f"{name}/normalized", axis=2)
