"""Logits on a GPU: selection of rows, and the most likely token of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mpt_trt.engines.onnxruntime.graph_editor import Graph, make_node


def choose_rows_by_number(model: onnx.ModelProto) -> None:
    """Replaces the input `logit_positions` with `logit_rows`: row * seq + index, `[num_logits]`.

    ONNX Runtime's GatherND copies a table to the GPU at each run, and releases it in a callback
    where CUDA does not permit it.
    """
    graph = Graph(model)
    [gather] = [node for node in graph.nodes if node.op_type == "GatherND"]
    flat = f"{gather.output[0]}/flat"
    chosen = [
        make_node("Flatten", [gather.input[0]], flat, axis=2),
        helper.make_node("Gather", [flat, "logit_rows"], list(gather.output), name=gather.name),
    ]
    graph.store({gather.name: chosen})
    [positions] = [value for value in model.graph.input if value.name == "logit_positions"]
    positions.name = "logit_rows"
    del positions.type.tensor_type.shape.dim[1]


def append_argmax(model: onnx.ModelProto) -> None:
    """Adds outputs for greedy decoding: the next step's inputs, and its tokens' likelihood.

    Only for networks that are specialized for one token. The outputs are next_ids int64 `[batch,
    1]`, next_positions int64 `[batch]`, and sum_exp_relative_to_max float32 `[batch, 1]`: the sum
    of exp(logit - largest logit), which is 1 / the probability of the most likely token.
    """
    graph = model.graph
    one = numpy_helper.from_array(np.array(1, np.int64), "one_position")
    graph.initializer.append(one)
    axis = numpy_helper.from_array(np.array([-1], np.int64), "last_axis")
    graph.initializer.append(axis)
    # Not LogSoftmax, because its kernel reads a whole row with one of the GPU's processors.
    last_axis: dict[str, Any] = {"axis": -1}
    graph.node.extend(
        [
            make_node("ArgMax", ["logits"], "next_ids", **last_axis),
            make_node("GatherElements", ["logits", "next_ids"], "argmax/logit", **last_axis),
            make_node("Sub", ["logits", "argmax/logit"], "argmax/distance"),
            make_node("Exp", ["argmax/distance"], "argmax/exp"),
            make_node("ReduceSum", ["argmax/exp", "last_axis"], "sum_exp_relative_to_max"),
            make_node("Add", ["write_positions", "one_position"], "next_positions"),
        ]
    )
    outputs: tuple[tuple[str, int, list[str | int]], ...] = (
        ("next_ids", TensorProto.INT64, ["batch", 1]),
        ("sum_exp_relative_to_max", TensorProto.FLOAT, ["batch", 1]),
        ("next_positions", TensorProto.INT64, ["batch"]),
    )
    for name, element_type, shape in outputs:
        graph.output.append(helper.make_tensor_value_info(name, element_type, shape))
