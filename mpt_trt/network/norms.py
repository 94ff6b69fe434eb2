"""Layer norms and RMS norms of the network, and the norms of queries and keys across ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Range, Rank
from mpt_trt.model.tensors import Weight, preceding_norm
from mpt_trt.network.graph import GraphBuilder


def emit_norm(graph: GraphBuilder, config: MptConfig, name: str, value: str) -> str:
    """Adds the model's kind of norm over the hidden features."""
    epsilon = config.layer_norm_epsilon
    if config.norm_type == "layernorm":
        return _emit_layer_norm(graph, name, value, epsilon)
    inputs = [value, graph.weight(f"{name}.weight")]
    return graph.node("RMSNormalization", inputs, name, axis=-1, epsilon=epsilon)


def emit_norm_before(graph: GraphBuilder, config: MptConfig, weight: Weight, value: str) -> str:
    """Adds the norm whose output a block's matrix multiplies."""
    norm = preceding_norm(weight)
    if norm is None:
        raise ValueError(f"{weight.name} follows no norm")
    return emit_norm(graph, config, norm, value)


def _emit_layer_norm(graph: GraphBuilder, name: str, value: str, epsilon: float) -> str:
    inputs = [value, graph.weight(f"{name}.weight")]
    if graph.has_weight(f"{name}.bias"):
        inputs.append(graph.weight(f"{name}.bias"))
    return graph.node("LayerNormalization", inputs, name, axis=-1, epsilon=epsilon)


@dataclass(frozen=True)
class QueryKeyNorms:
    """Layer norms over all query features and over all key features of a token (`qk_ln`)."""

    graph: GraphBuilder
    config: MptConfig
    rank: Rank

    def emit(self, name: str, query: str, key: str) -> tuple[str, str]:
        """Adds the norms of the attention layer `name`; query, key: `[batch, seq, features]`."""
        if self.rank.tp_size > 1:
            return self._across_ranks(name, query, key)
        epsilon = self.config.qk_ln_epsilon
        return (
            _emit_layer_norm(self.graph, f"{name}.q_layernorm", query, epsilon),
            _emit_layer_norm(self.graph, f"{name}.k_layernorm", key, epsilon),
        )

    def _across_ranks(self, name: str, query: str, key: str) -> tuple[str, str]:
        """Adds the norms of features that are divided among ranks.

        One all-reduce in float32 adds the sums and the sums of squares of both.
        """
        graph = self.graph
        held = sharding.qkv_columns(self.config, self.rank)
        columns = (held[0], held[1].shifted(-self.config.hidden_size))
        widths = (self.config.hidden_size, self.config.kv_size)
        values = [
            graph.node("Cast", [value], f"{value}/float", to=TensorProto.FLOAT)
            for value in (query, key)
        ]
        means = []
        for value, part, width in zip(values, columns, widths, strict=True):
            # Ranks with the same K/V heads each add their share of the same sums.
            copies = len(part) * self.rank.tp_size / width
            scale = graph.constant(f"{value}/share", 1 / (width * copies), np.float32)
            means += self._means(value, scale)
        packed = graph.node("Concat", means, f"{name}/own_means", axis=2)
        packed = graph.all_reduce(packed, f"{name}/means", TensorProto.FLOAT)
        parts = [f"{name}/{kind}" for kind in ("q_mean", "q_square", "k_mean", "k_square")]
        graph.split(packed, parts, [1, 1, 1, 1], axis=2, name=f"{name}/split_means")
        return (
            self._apply_norm(f"{name}.q_layernorm", values[0], parts[0], parts[1], columns[0]),
            self._apply_norm(f"{name}.k_layernorm", values[1], parts[2], parts[3], columns[1]),
        )

    def _means(self, value: str, scale: str) -> list[str]:
        """Adds this rank's share of the mean and of the mean square, each `[batch, seq, 1]`."""
        graph = self.graph
        axis = graph.constant("axis_2", [2], np.int64)
        square = graph.node("Mul", [value, value], f"{value}/squared")
        sums = [
            graph.node("ReduceSum", [part, axis], f"{part}/sum", keepdims=1)
            for part in (value, square)
        ]
        return [graph.node("Mul", [total, scale], f"{total}/share_of_mean") for total in sums]

    def _apply_norm(self, name: str, value: str, mean: str, square: str, columns: Range) -> str:
        graph = self.graph
        squared_mean = graph.node("Mul", [mean, mean], f"{name}/squared_mean")
        variance = graph.node("Sub", [square, squared_mean], f"{name}/variance")
        epsilon = graph.constant("qk_ln_epsilon", self.config.qk_ln_epsilon, np.float32)
        deviation = graph.node("Add", [variance, epsilon], f"{name}/variance_and_epsilon")
        deviation = graph.node("Sqrt", [deviation], f"{name}/deviation")
        centred = graph.node("Sub", [value, mean], f"{name}/centred")
        normed = graph.node("Div", [centred, deviation], f"{name}/float")
        normed = graph.node("Cast", [normed], f"{name}/normed", to=graph.element_type)
        weight = graph.weight_rows(f"{name}.weight", columns)
        normed = graph.node("Mul", [normed, weight], f"{name}/scaled")
        if not graph.has_weight(f"{name}.bias"):
            return normed
        bias = graph.weight_rows(f"{name}.bias", columns)
        return graph.node("Add", [normed, bias], name)
