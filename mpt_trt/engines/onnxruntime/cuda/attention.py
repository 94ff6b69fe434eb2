"""Attention on a GPU: over the filled part of the cache, through ONNX Runtime's own operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mpt_trt.engines.onnxruntime.graph_editor import (
    MICROSOFT_DOMAIN,
    Graph,
    Replacements,
    attributes,
    make_node,
    reshape,
)

# Inputs of MultiHeadAttention.
MHA_KEYS, MHA_KEY_COUNTS = 1, 4


def attend_to_filled_cache(model: onnx.ModelProto) -> None:
    """Lets attention read only the first `key_length` positions of the cache.

    key_length: a new input, int64 `[1]`, in host memory. A quantized cache is left unchanged.
    """
    graph = Graph(model)
    replacements: Replacements = {}
    start, axis = graph.constant("first_key", [0]), graph.constant("axis_of_keys", [2])
    for node in graph.nodes:
        if node.op_type != "Attention":
            continue
        if any(graph.maker[name].op_type != "TensorScatter" for name in node.input[1:3]):
            return
        slices = [
            make_node("Slice", [whole, start, "key_length", axis], f"{whole}/filled")
            for whole in node.input[1:3]
        ]
        attention = onnx.NodeProto()
        attention.CopyFrom(node)
        attention.input[1], attention.input[2] = (each.output[0] for each in slices)
        replacements[node.name] = [*slices, attention]
    [length] = [n for n in graph.nodes if n.op_type == "Shape" and n.input[0] == "past_key.0"]
    [reader] = graph.readers[length.output[0]]
    replacements[length.name] = []
    reader.input[0] = "key_length"
    graph.store(replacements)
    value = helper.make_tensor_value_info("key_length", TensorProto.INT64, [1])
    model.graph.input.append(value)


def fuse_attention(model: onnx.ModelProto) -> None:
    """Uses ONNX Runtime's own attention if keys have as many heads as queries.

    It reads queries in the layout of their product, so only keys and values are transposed.
    """
    graph = Graph(model)
    replacements: Replacements = {}
    for node in graph.nodes:
        if node.op_type != "Attention":
            continue
        num_heads, num_kv_heads = _heads(graph, node)
        if num_heads != num_kv_heads:
            return
        replacements |= _with_flat_queries(graph, node, num_heads)
    graph.store(replacements)


def _with_flat_queries(graph: Graph, attention: onnx.NodeProto, num_heads: int) -> Replacements:
    """Splits queries, keys and values first, and then reshapes only keys and values."""
    split = graph.maker[attention.input[0]]
    transpose = graph.maker[split.input[0]]
    whole_reshape = graph.maker[transpose.input[0]]
    [transpose_back] = graph.readers[attention.output[0]]
    [merge] = graph.readers[transpose_back.output[0]]
    head_dim = int(numpy_helper.to_array(graph.initializers[whole_reshape.input[1]])[-1])
    sizes = graph.constant("sizes_of_flat_parts", [num_heads * head_dim] * 3)
    heads = graph.constant(f"heads_{num_heads}", [0, 0, num_heads, head_dim])
    flat = [f"{part}/flat" for part in split.output]
    nodes = [
        helper.make_node("Split", [whole_reshape.input[0], sizes], flat, name=split.name, axis=2),
    ]
    for part, name in zip(split.output[1:], flat[1:], strict=True):
        nodes += [
            reshape(name, heads, f"{part}/heads"),
            make_node("Transpose", [f"{part}/heads"], part, perm=[0, 2, 1, 3]),
        ]
    fused = _multi_head_attention(attention, flat[0], num_heads, merge.output[0])
    return {
        whole_reshape.name: [],
        transpose.name: [],
        split.name: nodes,
        attention.name: [fused],
        transpose_back.name: [],
        merge.name: [],
    }


def compute_attention_of_one_query(model: onnx.ModelProto) -> None:
    """Computes attention in a form that suits single queries.

    Only for networks that are specialized for one token. The portable operator works on blocks of
    queries, and one query leaves most of a GPU idle. ONNX Runtime's own operator needs the same
    number of heads for keys and queries; other networks get two products and a softmax.
    """
    graph = Graph(model)
    replacements: Replacements = {}
    for node in graph.nodes:
        if node.op_type != "Attention":
            continue
        num_heads, num_kv_heads = _heads(graph, node)
        if num_heads == num_kv_heads:
            replacements[node.name] = _fused_attention(graph, node, num_heads)
        else:
            replacements[node.name] = _written_out(graph, node, num_kv_heads)
    graph.store(replacements)


def _heads(graph: Graph, attention: onnx.NodeProto) -> tuple[int, int]:
    """Number of heads of queries, and of keys."""
    split = graph.maker[attention.input[0]]
    num_heads, num_kv_heads, _ = numpy_helper.to_array(graph.initializers[split.input[1]])
    return int(num_heads), int(num_kv_heads)


def _fused_attention(graph: Graph, node: onnx.NodeProto, num_heads: int) -> list[onnx.NodeProto]:
    """Passes keys and values as those of another sequence, because the cache already contains them.

    The result is `[batch, 1, heads * head_dim]`. Its readers expect `[batch, heads, 1, head_dim]`,
    which has the same layout.
    """
    name = f"{node.name}/merged_query"
    merged = graph.constant("merged_heads_of_one", [0, 1, -1])
    attention = _multi_head_attention(node, name, num_heads, node.output[0])
    return [reshape(node.input[0], merged, name), attention]


def _multi_head_attention(
    node: onnx.NodeProto, query: str, num_heads: int, output: str
) -> onnx.NodeProto:
    """Replaces an Attention node. query, output: `[batch, seq, heads * head_dim]`."""
    _, keys, values, bias = node.input
    return helper.make_node(
        "MultiHeadAttention",
        [query, keys, values, "", "", bias],
        [output],
        name=node.name,
        domain=MICROSOFT_DOMAIN,
        num_heads=num_heads,
        scale=attributes(node)["scale"],
    )


def _written_out(graph: Graph, node: onnx.NodeProto, num_kv_heads: int) -> list[onnx.NodeProto]:
    """Computes attention as two products and a softmax; queries that share keys are rows of one."""
    query, keys, values, bias = node.input
    name, output = node.name, node.output[0]
    grouped = graph.constant("queries_of_keys", [0, num_kv_heads, -1, 0])
    by_head = graph.constant("scores_of_heads", [0, -1, 1, 0])
    by_keys = graph.constant("scores_of_keys", [0, num_kv_heads, -1, 0])
    product: dict[str, Any] = {"transB": 1, "alpha": attributes(node)["scale"]}
    own, inputs = MICROSOFT_DOMAIN, [f"{name}/grouped", keys]
    return [
        reshape(query, grouped, f"{name}/grouped"),
        make_node("FusedMatMul", inputs, f"{name}/products", own, **product),
        reshape(f"{name}/products", by_head, f"{name}/products_of_heads"),
        make_node("Add", [f"{name}/products_of_heads", bias], f"{name}/scores"),
        make_node("Softmax", [f"{name}/scores"], f"{name}/weights_of_heads", axis=-1),
        reshape(f"{name}/weights_of_heads", by_keys, f"{name}/weights"),
        make_node("MatMul", [f"{name}/weights", values], f"{name}/by_keys"),
        reshape(f"{name}/by_keys", by_head, output),
    ]


def attend_to_keys_in_use(model: onnx.ModelProto) -> None:
    """Passes each row's number of keys to ONNX Runtime's attention, so that it reads no others.

    Only for networks that are specialized for one token. A quantized cache is left unchanged,
    because the step's own key then comes after the whole cache.
    """
    graph = Graph(model)
    fused = [
        node
        for node in graph.nodes
        if node.op_type == "MultiHeadAttention"
        and graph.maker[node.input[MHA_KEYS]].op_type == "TensorScatter"
    ]
    if not fused:
        return
    for node in fused:
        node.input[MHA_KEY_COUNTS] = "keys/count"
    one = numpy_helper.from_array(np.array(1, np.int32), "one_key")
    graph.initializers[one.name] = one
    graph.nodes[:0] = [
        make_node("Cast", ["write_positions"], "keys/last", to=TensorProto.INT32),
        make_node("Add", ["keys/last", one.name], "keys/count"),
    ]
    graph.store(_without_mask(graph))


def _without_mask(graph: Graph) -> Replacements:
    """Keeps only ALiBi's scores of a bias that also hides keys after the query."""
    masked = graph.maker["bias/masked"]
    visible, scores, _ = masked.input
    if scores in graph.initializers:
        return {}
    unmasked = helper.make_node("Identity", [scores], masked.output, name=masked.name)
    return {masked.name: [unmasked], graph.maker[visible].name: []}
