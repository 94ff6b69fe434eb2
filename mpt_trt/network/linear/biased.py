"""Linear layers with biases, on one rank or with input features divided among ranks."""

from __future__ import annotations

from mpt_trt.ft.layout import linear_name
from mpt_trt.model.tensors import Weight
from mpt_trt.network.graph import GraphBuilder
from mpt_trt.network.linear.base import LinearLayers


def emit_linear(graph: GraphBuilder, layers: LinearLayers, weight: Weight, value: str) -> str:
    """Adds a linear layer and, if the model has one, its bias."""
    return _add_bias(graph, weight, layers.emit(graph, weight, value))


def emit_row_split_linear(
    graph: GraphBuilder, layers: LinearLayers, weight: Weight, value: str
) -> str:
    """Adds a linear layer whose input features are divided among ranks.

    The ranks' products are added before the bias.
    """
    product = layers.emit(graph, weight, value)
    total = graph.all_reduce(product, f"{linear_name(weight)}/all_ranks")
    return _add_bias(graph, weight, total)


def _add_bias(graph: GraphBuilder, weight: Weight, product: str) -> str:
    name = linear_name(weight)
    if not graph.has_weight(f"{name}.bias"):
        return product
    return graph.node("Add", [product, graph.weight(f"{name}.bias")], f"{name}/biased")
