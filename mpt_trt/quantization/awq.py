"""Rounds matrices that AWQ has scaled (Lin et al., arXiv:2306.00978) to 4-bit integers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpt_trt.arrays.cast import convert, one_thread_session
from mpt_trt.quantization.integers import BLOCK_ELEMENTS, FLOAT32

# The first opset with quantization in blocks, and its IR version.
OPSET, IR_VERSION = 21, 10


def quantized_rows(weight: NDArray[Any], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """Computes round(weight / scale), half to even, in -8..7.

    weight: `[out_features, in_features]`. scales: `[out_features, in_features / group_size]`.
    """
    nonzero = np.where(scales == 0, np.float32(1), scales)
    quantized = np.empty(weight.shape, np.int8)
    quantizer = _quantizer(weight.shape[1] // max(1, scales.shape[1]))
    step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        rows = convert(np.ascontiguousarray(weight[part]), FLOAT32)
        [rounded] = quantizer.run(None, {"weight": rows, "scales": nonzero[part]})
        np.clip(rounded, -8, 7, out=quantized[part])
    return quantized


@functools.cache
def _quantizer(group_size: int) -> onnxruntime.InferenceSession:
    """Makes a session that computes round(weight / scale), half to even, in one pass."""
    node = helper.make_node(
        "QuantizeLinear",
        ["weight", "scales"],
        ["rounded"],
        axis=1,
        block_size=group_size,
        output_dtype=TensorProto.INT8,
    )
    floats = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", None])
        for name in node.input
    ]
    rounded = helper.make_tensor_value_info("rounded", TensorProto.INT8, ["rows", None])
    graph = helper.make_graph([node], "quantizer", floats, [rounded])
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    return one_thread_session(model.SerializeToString())
