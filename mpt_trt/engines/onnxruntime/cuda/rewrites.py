"""What becomes of a network when ONNX Runtime loads it on a GPU.

The portable network is the reference: each rewrite computes the same values, and is made in memory.
Operators of the domain `com.microsoft` are ONNX Runtime's own.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mpt_trt.engines.onnxruntime.rewrites import cast

DOMAIN = "com.microsoft"
# Inputs of MultiHeadAttention.
MHA_KEYS, MHA_KEY_COUNTS = 1, 4
NORMS = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
}


class Graph:
    """A graph that is being edited: who makes a value, and who reads it."""

    def __init__(self, model: onnx.ModelProto):
        self._model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.maker = {output: node for node in self.nodes for output in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)

    def constant(self, name: str, values: list[int]) -> str:
        """An int64 vector in the graph."""
        self.initializers[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def store(self, replaced: Mapping[str, list[onnx.NodeProto]] = MappingProxyType({})) -> None:
        """Writes the graph back, without initializers that no node reads any more.

        replaced: nodes in the places of others, which are named.
        """
        nodes = [new for node in self.nodes for new in replaced.get(node.name, [node])]
        used = {name for node in nodes for name in node.input}
        kept = [tensor for name, tensor in self.initializers.items() if name in used]
        del self._model.graph.node[:], self._model.graph.initializer[:]
        self._model.graph.node.extend(nodes)
        self._model.graph.initializer.extend(kept)
        declared = {each.domain for each in self._model.opset_import}
        if any(node.domain == DOMAIN for node in nodes) and DOMAIN not in declared:
            self._model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """A node's attributes by name."""
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def prefill_graph(network: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the network that reads prompts."""
    model = copy.deepcopy(network)
    clip_in_float32(model)
    choose_rows_by_number(model)
    fuse_residual_norms(model)
    attend_to_filled_cache(model)
    fuse_attention(model)
    return model


def decode_graph(network: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the network for steps of one token a row, which chooses the likeliest tokens."""
    model = copy.deepcopy(network)
    clip_in_float32(model)
    specialize_for_one_token(model)
    fuse_residual_norms(model)
    norm_with_fast_kernels(model)
    compute_attention_of_one_query(model)
    attend_to_keys_in_use(model)
    append_argmax(model)
    return model


def clip_in_float32(model: onnx.ModelProto) -> None:
    """ONNX Runtime has no kernel that clips bfloat16; to clip it as float32 is exact."""
    graph = Graph(model)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        if node.op_type != "Clip":
            continue
        value, *bounds = node.input
        if graph.initializers[bounds[0]].data_type != TensorProto.BFLOAT16:
            return
        wide, clipped = f"{node.name}/wide", f"{node.name}/wide_clipped"
        wide_bounds = [f"{bound}/wide" for bound in bounds]
        for bound, name in zip(bounds, wide_bounds, strict=True):
            number = numpy_helper.to_array(graph.initializers[bound]).astype(np.float32)
            graph.initializers[name] = numpy_helper.from_array(number, name)
        replaced[node.name] = [
            cast(value, wide, TensorProto.FLOAT),
            helper.make_node("Clip", [wide, *wide_bounds], [clipped], name=clipped),
            cast(clipped, node.output[0], TensorProto.BFLOAT16),
        ]
    graph.store(replaced)


def fuse_residual_norms(model: onnx.ModelProto) -> None:
    """Adds to the residual stream within the norm that follows: one pass over the hidden states."""
    graph = Graph(model)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for add in graph.nodes:
        if add.op_type != "Add" or any(name in graph.initializers for name in add.input):
            continue
        norms = [node for node in graph.readers[add.output[0]] if node.op_type in NORMS]
        if len(norms) != 1:
            continue
        [norm] = norms
        outputs = [norm.output[0], "", "", add.output[0]]
        replaced |= {add.name: [], norm.name: [_norm_of_sum(norm, add.input, outputs)]}
    graph.store(replaced)


def _norm_of_sum(
    norm: onnx.NodeProto, terms: Sequence[str], outputs: Sequence[str]
) -> onnx.NodeProto:
    """In the place of `norm`: it norms the sum of two values, and its fourth output is the sum."""
    return helper.make_node(
        NORMS[norm.op_type],
        [*terms, *norm.input[1:]],
        outputs,
        name=norm.name,
        domain=DOMAIN,
        epsilon=attributes(norm)["epsilon"],
    )


def choose_rows_by_number(model: onnx.ModelProto) -> None:
    """Takes `logit_rows` int64 `[num_logits]`, row * seq + index, instead of `logit_positions`.

    ONNX Runtime's GatherND copies a table to the GPU at each run, and releases it in a callback in
    which CUDA does not permit that.
    """
    graph = Graph(model)
    [gather] = [node for node in graph.nodes if node.op_type == "GatherND"]
    flat = f"{gather.output[0]}/flat"
    chosen = [
        helper.make_node("Flatten", [gather.input[0]], [flat], name=flat, axis=2),
        helper.make_node("Gather", [flat, "logit_rows"], list(gather.output), name=gather.name),
    ]
    graph.store({gather.name: chosen})
    [positions] = [value for value in model.graph.input if value.name == "logit_positions"]
    positions.name = "logit_rows"
    del positions.type.tensor_type.shape.dim[1]


def attend_to_filled_cache(model: onnx.ModelProto) -> None:
    """Attention reads the first `key_length` positions of the cache, not all that it has room for.

    key_length: an input, int64 `[1]`, in host memory. A quantized cache is left as it is.
    """
    graph = Graph(model)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    start, axis = graph.constant("first_key", [0]), graph.constant("axis_of_keys", [2])
    for node in graph.nodes:
        if node.op_type == "Shape" and node.input[0] == "past_key.0":
            length = node
        if node.op_type != "Attention":
            continue
        if any(graph.maker[name].op_type != "TensorScatter" for name in node.input[1:3]):
            return
        slices = [
            helper.make_node(
                "Slice",
                [whole, start, "key_length", axis],
                [f"{whole}/filled"],
                name=f"{whole}/filled",
            )
            for whole in node.input[1:3]
        ]
        attention = onnx.NodeProto()
        attention.CopyFrom(node)
        attention.input[1], attention.input[2] = (each.output[0] for each in slices)
        replaced[node.name] = [*slices, attention]
    [reader] = graph.readers[length.output[0]]
    replaced[length.name] = []
    reader.input[0] = "key_length"
    graph.store(replaced)
    value = helper.make_tensor_value_info("key_length", TensorProto.INT64, [1])
    model.graph.input.append(value)


def fuse_attention(model: onnx.ModelProto) -> None:
    """ONNX Runtime's own attention, where keys have as many heads as queries.

    It takes queries as they come from their product, so that only keys and values are transposed.
    """
    graph = Graph(model)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        if node.op_type != "Attention":
            continue
        num_heads, num_kv_heads = _heads(graph, node)
        if num_heads != num_kv_heads:
            return
        replaced |= _with_flat_queries(graph, node, num_heads)
    graph.store(replaced)


def _with_flat_queries(
    graph: Graph, attention: onnx.NodeProto, num_heads: int
) -> dict[str, list[onnx.NodeProto]]:
    split = graph.maker[attention.input[0]]
    transpose = graph.maker[split.input[0]]
    reshape = graph.maker[transpose.input[0]]
    [behind] = graph.readers[attention.output[0]]
    [merge] = graph.readers[behind.output[0]]
    head_dim = int(numpy_helper.to_array(graph.initializers[reshape.input[1]])[-1])
    sizes = graph.constant("sizes_of_flat_parts", [num_heads * head_dim] * 3)
    heads = graph.constant(f"heads_{num_heads}", [0, 0, num_heads, head_dim])
    flat = [f"{part}/flat" for part in split.output]
    nodes = [
        helper.make_node("Split", [reshape.input[0], sizes], flat, name=split.name, axis=2),
    ]
    for part, name in zip(split.output[1:], flat[1:], strict=True):
        nodes += [
            _reshape(name, heads, f"{part}/heads"),
            helper.make_node("Transpose", [f"{part}/heads"], [part], name=part, perm=[0, 2, 1, 3]),
        ]
    fused = _multi_head_attention(attention, flat[0], num_heads, merge.output[0])
    return {
        reshape.name: [],
        transpose.name: [],
        split.name: nodes,
        attention.name: [fused],
        behind.name: [],
        merge.name: [],
    }


def specialize_for_one_token(model: onnx.ModelProto) -> None:
    """Makes `seq` 1 and asks for the logits of every row, in order, `[batch, vocab]`.

    There is no input `logit_positions` any more. Then nothing has to be transposed: with one
    position, `[batch, seq, heads, head_dim]` and `[batch, heads, seq, head_dim]` are one layout.
    """
    for value in model.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "seq":
                dimension.dim_value = 1
    graph = Graph(model)
    sizes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        if node.op_type == "GatherND":
            replaced |= _with_every_row(graph, node)
        elif node.op_type == "Transpose" and attributes(node)["perm"] == [0, 2, 1, 3]:
            replaced |= _without_transpose(graph, node)
        elif node.name == "positions/query":
            # The only token of a row is at offset 0.
            first = helper.make_node("Identity", node.input[:1], node.output, name=node.name)
            replaced[node.name] = [first]
        elif node.op_type == "Shape" and node.input[0] in sizes:
            found = attributes(node)
            part = sizes[node.input[0]][found["start"] : found["end"]]
            graph.constant(node.output[0], [size.dim_value for size in part])
            replaced[node.name] = []
    graph.store(replaced)
    kept = [value for value in model.graph.input if value.name != "logit_positions"]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    [logits] = [value for value in model.graph.output if value.name == "logits"]
    logits.type.tensor_type.shape.dim[0].dim_param = "batch"


def _with_every_row(graph: Graph, gather: onnx.NodeProto) -> dict[str, list[onnx.NodeProto]]:
    """The norm that reads chosen rows `[num_logits, hidden]` reads all `[batch, 1, hidden]`."""
    [norm] = graph.readers[gather.output[0]]
    every = onnx.NodeProto()
    every.CopyFrom(norm)
    every.input[0] = gather.input[0]
    every.name = every.output[0] = f"{norm.output[0]}/every"
    rows = _reshape(every.output[0], graph.constant("every_row", [0, -1]), norm.output[0])
    return {gather.name: [], norm.name: [every, rows]}


def _without_transpose(graph: Graph, transpose: onnx.NodeProto) -> dict[str, list[onnx.NodeProto]]:
    """A Reshape and a Transpose, in either order, as one Reshape."""
    before = graph.maker[transpose.input[0]]
    if before.op_type == "Reshape":
        # [batch, 1, heads * head_dim] to [batch, heads, 1, head_dim]
        [_, _, heads, head_dim] = numpy_helper.to_array(graph.initializers[before.input[1]])
        shape = graph.constant(f"split_heads_{heads}", [0, int(heads), 1, int(head_dim)])
        return {
            before.name: [],
            transpose.name: [_reshape(before.input[0], shape, transpose.output[0])],
        }
    # [batch, heads, 1, head_dim] to [batch, 1, heads * head_dim]
    [after] = graph.readers[transpose.output[0]]
    shape = graph.constant("merged_heads_of_one", [0, 1, -1])
    return {
        transpose.name: [],
        after.name: [_reshape(transpose.input[0], shape, after.output[0])],
    }


def _reshape(value: str, shape: str, output: str) -> onnx.NodeProto:
    return helper.make_node("Reshape", [value, shape], [output], name=output)


def compute_attention_of_one_query(model: onnx.ModelProto) -> None:
    """Attention in a form that suits single queries.

    For a network that is specialized for one token. The portable operator works on blocks of
    queries, of which there is one here, and leaves most of a GPU idle. ONNX Runtime's own operator
    wants as many heads of keys as of queries; otherwise, there are two products and a softmax.
    """
    graph = Graph(model)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        if node.op_type != "Attention":
            continue
        num_heads, num_kv_heads = _heads(graph, node)
        if num_heads == num_kv_heads:
            replaced[node.name] = _fused_attention(graph, node, num_heads)
        else:
            replaced[node.name] = _written_out(graph, node, num_kv_heads)
    graph.store(replaced)


def _heads(graph: Graph, attention: onnx.NodeProto) -> tuple[int, int]:
    """Heads of queries, and of keys."""
    split = graph.maker[attention.input[0]]
    num_heads, num_kv_heads, _ = numpy_helper.to_array(graph.initializers[split.input[1]])
    return int(num_heads), int(num_kv_heads)


def _fused_attention(graph: Graph, node: onnx.NodeProto, num_heads: int) -> list[onnx.NodeProto]:
    """Keys and values are given as those of another sequence, since the cache has them already.

    The result is `[batch, 1, heads * head_dim]`, which what reads it does not tell from
    `[batch, heads, 1, head_dim]`.
    """
    name = f"{node.name}/merged_query"
    merged = graph.constant("merged_heads_of_one", [0, 1, -1])
    attention = _multi_head_attention(node, name, num_heads, node.output[0])
    return [_reshape(node.input[0], merged, name), attention]


def _multi_head_attention(
    node: onnx.NodeProto, query: str, num_heads: int, output: str
) -> onnx.NodeProto:
    """For an Attention node. query, output: `[batch, seq, heads * head_dim]`."""
    _, keys, values, bias = node.input
    return helper.make_node(
        "MultiHeadAttention",
        [query, keys, values, "", "", bias],
        [output],
        name=node.name,
        domain=DOMAIN,
        num_heads=num_heads,
        scale=attributes(node)["scale"],
    )


def attend_to_keys_in_use(model: onnx.ModelProto) -> None:
    """ONNX Runtime's own attention is told how many keys each row has, and reads no others.

    For a network that is specialized for one token. A quantized cache is left as it is: there, the
    step's own key stands behind all of the cache.
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
    last = "keys/last"
    graph.nodes[:0] = [
        helper.make_node("Cast", ["write_positions"], [last], name=last, to=TensorProto.INT32),
        helper.make_node("Add", [last, one.name], ["keys/count"], name="keys/count"),
    ]
    graph.store(_without_mask(graph))


def _without_mask(graph: Graph) -> dict[str, list[onnx.NodeProto]]:
    """ALiBi's scores alone, where a bias also hides keys behind the query."""
    masked = graph.maker["bias/masked"]
    visible, scores, _ = masked.input
    if scores in graph.initializers:
        return {}
    alone = helper.make_node("Identity", [scores], masked.output, name=masked.name)
    return {masked.name: [alone], graph.maker[visible].name: []}


def _written_out(graph: Graph, node: onnx.NodeProto, num_kv_heads: int) -> list[onnx.NodeProto]:
    """Queries that share keys are rows of one product."""
    query, keys, values, bias = node.input
    name, output = node.name, node.output[0]
    grouped = graph.constant("queries_of_keys", [0, num_kv_heads, -1, 0])
    by_head = graph.constant("scores_of_heads", [0, -1, 1, 0])
    by_keys = graph.constant("scores_of_keys", [0, num_kv_heads, -1, 0])

    def step(op_type: str, inputs: list[str], result: str, **options: object) -> onnx.NodeProto:
        return helper.make_node(op_type, inputs, [result], name=result, **options)

    return [
        step("Reshape", [query, grouped], f"{name}/grouped"),
        step(
            "FusedMatMul",
            [f"{name}/grouped", keys],
            f"{name}/products",
            domain=DOMAIN,
            transB=1,
            alpha=attributes(node)["scale"],
        ),
        step("Reshape", [f"{name}/products", by_head], f"{name}/products_of_heads"),
        step("Add", [f"{name}/products_of_heads", bias], f"{name}/scores"),
        step("Softmax", [f"{name}/scores"], f"{name}/weights_of_heads", axis=-1),
        step("Reshape", [f"{name}/weights_of_heads", by_keys], f"{name}/weights"),
        step("MatMul", [f"{name}/weights", values], f"{name}/by_keys"),
        step("Reshape", [f"{name}/by_keys", by_head], output),
    ]


def norm_with_fast_kernels(model: onnx.ModelProto) -> None:
    """Norms without a residual as those that have one: zeros.

    For a network that is specialized for one token. ONNX Runtime's kernel for a plain norm takes
    three times as long.
    """
    graph = Graph(model)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        if node.op_type not in NORMS:
            continue
        weight = graph.initializers[node.input[1]]
        width = weight.dims[0]
        nothing = f"zeros_{width}"
        if nothing not in graph.initializers:
            zeros = helper.make_tensor(nothing, weight.data_type, [1, 1, width], np.zeros(width))
            graph.initializers[nothing] = zeros
        replaced[node.name] = [_norm_of_sum(node, [node.input[0], nothing], node.output)]
    graph.store(replaced)


def append_argmax(model: onnx.ModelProto) -> None:
    """Adds what the next step of greedy decoding takes, and the likelihood of its tokens.

    For a network that is specialized for one token: next_ids int64 `[batch, 1]`,
    next_positions int64 `[batch]`, and sum_exp_relative_to_max float32 `[batch, 1]`: the
    sum over all tokens of their probability divided by that of the likeliest one.
    """
    graph = model.graph
    one = numpy_helper.from_array(np.array(1, np.int64), "one_position")
    graph.initializer.append(one)
    axis = numpy_helper.from_array(np.array([-1], np.int64), "last_axis")
    graph.initializer.append(axis)
    # Not LogSoftmax: its kernel reads a whole row with one of the GPU's processors.
    operations: tuple[tuple[str, list[str], str, dict[str, int]], ...] = (
        ("ArgMax", ["logits"], "next_ids", {"axis": -1}),
        ("GatherElements", ["logits", "next_ids"], "likeliest/logit", {"axis": -1}),
        ("Sub", ["logits", "likeliest/logit"], "likeliest/distance", {}),
        ("Exp", ["likeliest/distance"], "likeliest/odds", {}),
        ("ReduceSum", ["likeliest/odds", "last_axis"], "sum_exp_relative_to_max", {}),
        ("Add", ["write_positions", "one_position"], "next_positions", {}),
    )
    for op_type, inputs, output, options in operations:
        graph.node.append(helper.make_node(op_type, inputs, [output], name=output, **options))
    for name, element_type, shape in (
        ("next_ids", TensorProto.INT64, ["batch", 1]),
        ("sum_exp_relative_to_max", TensorProto.FLOAT, ["batch", 1]),
        ("next_positions", TensorProto.INT64, ["batch"]),
    ):
        graph.output.append(helper.make_tensor_value_info(name, element_type, shape))
