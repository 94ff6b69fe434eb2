"""Norms on a GPU: ONNX Runtime's own operators, which also add to the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from mpt_trt.engines.onnxruntime.graph_editor import (
    MICROSOFT_DOMAIN,
    Graph,
    Replacements,
    attributes,
)

NORMS = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
}
"""Operator that norms a sum, for each of the portable network's norms."""


def fuse_residual_norms(model: onnx.ModelProto) -> None:
    """Adds to the residual stream within the next norm, in one pass over the hidden states."""
    graph = Graph(model)
    replacements: Replacements = {}
    for add in graph.nodes:
        if add.op_type != "Add" or any(name in graph.initializers for name in add.input):
            continue
        norms = [node for node in graph.readers[add.output[0]] if node.op_type in NORMS]
        if len(norms) != 1:
            continue
        [norm] = norms
        outputs = [norm.output[0], "", "", add.output[0]]
        replacements |= {add.name: [], norm.name: [_norm_of_sum(norm, add.input, outputs)]}
    graph.store(replacements)


def norm_with_fast_kernels(model: onnx.ModelProto) -> None:
    """Turns norms without a residual into norms with a residual of zeros.

    Only for networks that are specialized for one token. ONNX Runtime's kernel for a plain norm is
    slower (docs/appendix/experiments.md).
    """
    graph = Graph(model)
    replacements: Replacements = {}
    for node in graph.nodes:
        if node.op_type not in NORMS:
            continue
        weight = graph.initializers[node.input[1]]
        width = weight.dims[0]
        zeros = f"zeros_{width}"
        if zeros not in graph.initializers:
            graph.initializers[zeros] = helper.make_tensor(
                zeros, weight.data_type, [1, 1, width], np.zeros(width)
            )
        replacements[node.name] = [_norm_of_sum(node, [node.input[0], zeros], node.output)]
    graph.store(replacements)


def _norm_of_sum(
    norm: onnx.NodeProto, terms: Sequence[str], outputs: Sequence[str]
) -> onnx.NodeProto:
    """Replaces `norm`: norms the sum of two values, and returns the sum as its fourth output."""
    return helper.make_node(
        NORMS[norm.op_type],
        [*terms, *norm.input[1:]],
        outputs,
        name=norm.name,
        domain=MICROSOFT_DOMAIN,
        epsilon=attributes(norm)["epsilon"],
    )
