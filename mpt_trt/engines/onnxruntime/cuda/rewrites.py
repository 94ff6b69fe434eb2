"""Rewrites a network for ONNX Runtime on a GPU: one graph for prompts, one for single tokens.

The portable network is the reference: each rewrite computes the same values, and works in memory.
"""

from __future__ import annotations

import copy

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mpt_trt.engines.onnxruntime.cuda.attention import (
    attend_to_filled_cache,
    attend_to_keys_in_use,
    compute_attention_of_one_query,
    fuse_attention,
)
from mpt_trt.engines.onnxruntime.cuda.logit_rows import append_argmax, choose_rows_by_number
from mpt_trt.engines.onnxruntime.cuda.norms import fuse_residual_norms, norm_with_fast_kernels
from mpt_trt.engines.onnxruntime.cuda.one_token import specialize_for_one_token
from mpt_trt.engines.onnxruntime.graph_editor import Graph, Replacements, cast


def prefill_graph(network: onnx.ModelProto) -> onnx.ModelProto:
    """Makes a copy of the network that reads prompts."""
    model = copy.deepcopy(network)
    clip_in_float32(model)
    choose_rows_by_number(model)
    fuse_residual_norms(model)
    attend_to_filled_cache(model)
    fuse_attention(model)
    return model


def decode_graph(network: onnx.ModelProto) -> onnx.ModelProto:
    """Makes a copy of the network that reads one token per row and chooses the next tokens."""
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
    """Clips bfloat16 as float32, which is exact, because ONNX Runtime cannot clip bfloat16."""
    graph = Graph(model)
    replacements: Replacements = {}
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
        replacements[node.name] = [
            cast(value, wide, TensorProto.FLOAT),
            helper.make_node("Clip", [wide, *wide_bounds], [clipped], name=clipped),
            cast(clipped, node.output[0], TensorProto.BFLOAT16),
        ]
    graph.store(replacements)
