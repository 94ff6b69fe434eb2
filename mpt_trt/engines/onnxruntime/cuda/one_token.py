"""Specializes a network for steps of one token per row."""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper

from mpt_trt.engines.onnxruntime.graph_editor import Graph, Replacements, attributes, reshape


def specialize_for_one_token(model: onnx.ModelProto) -> None:
    """Makes `seq` 1 and returns the logits of every row, in order, `[batch, vocab]`.

    Removes the input `logit_positions` and all transposes: with one position, `[batch, seq, heads,
    head_dim]` and `[batch, heads, seq, head_dim]` have the same layout.
    """
    for value in model.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "seq":
                dimension.dim_value = 1
    _simplify(model)
    kept = [value for value in model.graph.input if value.name != "logit_positions"]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    [logits] = [value for value in model.graph.output if value.name == "logits"]
    logits.type.tensor_type.shape.dim[0].dim_param = "batch"


def _simplify(model: onnx.ModelProto) -> None:
    """Removes nodes that only several positions need."""
    graph = Graph(model)
    sizes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    replacements: Replacements = {}
    for node in graph.nodes:
        if node.op_type == "GatherND":
            replacements |= _with_every_row(graph, node)
        elif node.op_type == "Transpose" and attributes(node)["perm"] == [0, 2, 1, 3]:
            replacements |= _without_transpose(graph, node)
        elif node.name == "positions/query":
            # The only token of a row is at offset 0.
            first = helper.make_node("Identity", node.input[:1], node.output, name=node.name)
            replacements[node.name] = [first]
        elif node.op_type == "Shape" and node.input[0] in sizes:
            part = attributes(node)
            dimensions = sizes[node.input[0]][part["start"] : part["end"]]
            graph.constant(node.output[0], [size.dim_value for size in dimensions])
            replacements[node.name] = []
    graph.store(replacements)


def _with_every_row(graph: Graph, gather: onnx.NodeProto) -> Replacements:
    """Lets the norm that reads chosen rows `[num_logits, hidden]` read all `[batch, 1, hidden]`."""
    [norm] = graph.readers[gather.output[0]]
    every = onnx.NodeProto()
    every.CopyFrom(norm)
    every.input[0] = gather.input[0]
    every.name = every.output[0] = f"{norm.output[0]}/every"
    rows = reshape(every.output[0], graph.constant("every_row", [0, -1]), norm.output[0])
    return {gather.name: [], norm.name: [every, rows]}


def _without_transpose(graph: Graph, transpose: onnx.NodeProto) -> Replacements:
    """Turns a Reshape and a Transpose, in either order, into one Reshape."""
    before = graph.maker[transpose.input[0]]
    if before.op_type == "Reshape":
        # [batch, 1, heads * head_dim] to [batch, heads, 1, head_dim]
        [_, _, heads, head_dim] = numpy_helper.to_array(graph.initializers[before.input[1]])
        shape = graph.constant(f"split_heads_{heads}", [0, int(heads), 1, int(head_dim)])
        return {
            before.name: [],
            transpose.name: [reshape(before.input[0], shape, transpose.output[0])],
        }
    # [batch, heads, 1, head_dim] to [batch, 1, heads * head_dim]
    [after] = graph.readers[transpose.output[0]]
    shape = graph.constant("merged_heads_of_one", [0, 1, -1])
    return {
        transpose.name: [],
        after.name: [reshape(transpose.input[0], shape, after.output[0])],
    }
