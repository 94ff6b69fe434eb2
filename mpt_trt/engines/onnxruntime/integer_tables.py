"""Reads 8-bit embeddings and heads under ONNX Runtime, which would dequantize whole tables.

The table is `[rows, hidden]` with one scale per row. Rows are gathered as integers. The product
with the head becomes ONNX Runtime's own operator, MatMulNBits, whose integers have this order.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpt_trt.engines.onnxruntime.external_data import SharedWeight
from mpt_trt.engines.onnxruntime.graph_editor import (
    MICROSOFT_DOMAIN,
    Graph,
    Replacements,
    attributes,
    cast,
    make_node,
)
from mpt_trt.network.external_files import file_part
from mpt_trt.quantization.schemes import GROUP_SIZES

# Unsigned integers, in which 128 means 0.
SIGN_BIT = np.uint8(0x80)
# MatMulNBits' accuracy_level without rounding of activations.
EXACT = 1


def read_integer_tables(
    model: onnx.ModelProto, folder: Path, element_type: int
) -> list[SharedWeight]:
    """Replaces readers of dequantized tables; returns weights that the graph then lacks.

    folder: folder of the network. element_type: ONNX type of the session's arithmetic.
    """
    graph = Graph(model)
    replacements: Replacements = {}
    weights: list[SharedWeight] = []
    for node in graph.nodes:
        if not _is_table(graph, node):
            continue
        readers = graph.readers[node.output[0]]
        table = _Table(graph, node, folder, element_type)
        fused = [table.replacement(reader, weights) for reader in readers]
        if None not in fused:
            replacements[node.name] = []
        for reader, nodes in zip(readers, fused, strict=True):
            if nodes is not None:
                replacements[reader.name] = nodes
    graph.store(replacements)
    return weights


def _is_table(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type != "DequantizeLinear" or node.input[0] not in graph.initializers:
        return False
    integers, options = graph.initializers[node.input[0]], attributes(node)
    is_matrix = integers.data_type == TensorProto.INT8 and len(integers.dims) == 2
    return is_matrix and options.get("axis", 1) == 0 and not options.get("block_size", 0)


class _Table:
    """A table of integers, and the node that dequantizes it."""

    def __init__(self, graph: Graph, node: onnx.NodeProto, folder: Path, element_type: int):
        self._graph, self._element_type = graph, element_type
        self._integers, self._scale = node.input[:2]
        stored, scale = (graph.initializers[name] for name in node.input[:2])
        self._rows, self._width = stored.dims
        self._content, self._scale_content = file_part(stored, folder), file_part(scale, folder)
        self._scale_dtype = helper.tensor_dtype_to_np_dtype(scale.data_type)

    def replacement(
        self, reader: onnx.NodeProto, weights: list[SharedWeight]
    ) -> list[onnx.NodeProto] | None:
        """Makes nodes that compute the same as `reader`; None if there are none."""
        if reader.op_type == "Gather":
            return self._gather(reader)
        if reader.op_type != "Gemm" or not attributes(reader).get("transB"):
            return None
        block = next((size for size in GROUP_SIZES if self._width % size == 0), None)
        return None if block is None else [self._matmul(reader, block, weights)]

    def _gather(self, gather: onnx.NodeProto) -> list[onnx.NodeProto]:
        output, ids = gather.output[0], gather.input[1]
        rows, scales = f"{output}/integers", f"{output}/scale"
        last_axis = self._graph.constant("table/last_axis", [-1])
        return [
            make_node("Gather", [self._integers, ids], rows),
            make_node("Gather", [self._scale, ids], scales),
            make_node("Unsqueeze", [scales, last_axis], f"{scales}_of_row"),
            cast(rows, f"{rows}_cast", self._element_type),
            make_node("Mul", [f"{rows}_cast", f"{scales}_of_row"], output),
        ]

    def _matmul(
        self, gemm: onnx.NodeProto, block: int, weights: list[SharedWeight]
    ) -> onnx.NodeProto:
        blocks = self._width // block
        integers, scales = f"{self._integers}/unsigned", f"{self._scale}/of_blocks"
        shape = (self._rows, blocks, block)
        weights += [
            SharedWeight(integers, TensorProto.UINT8, shape, self._read_integers),
            SharedWeight(scales, self._element_type, shape[:2], partial(self._read_scales, blocks)),
        ]
        return helper.make_node(
            "MatMulNBits",
            [gemm.input[0], integers, scales],
            list(gemm.output),
            name=gemm.name,
            domain=MICROSOFT_DOMAIN,
            K=self._width,
            N=self._rows,
            bits=8,
            block_size=block,
            accuracy_level=EXACT,
        )

    def _read_integers(self) -> NDArray[np.uint8]:
        return self._content.read() ^ SIGN_BIT

    def _read_scales(self, blocks: int) -> NDArray:
        stored = self._scale_content.read().view(self._scale_dtype)
        dtype = helper.tensor_dtype_to_np_dtype(self._element_type)
        return np.repeat(stored.astype(dtype), blocks)
