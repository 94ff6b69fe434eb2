"""Makes one-node ONNX models with which mpt_trt.arrays casts and transposes arrays."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper

OPSET, IR_VERSION = 21, 10
FLOATS = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
INTEGERS = {
    "uint8": TensorProto.UINT8,
    "uint16": TensorProto.UINT16,
    "uint32": TensorProto.UINT32,
    "uint64": TensorProto.UINT64,
}


def run(options: argparse.Namespace) -> None:
    """Write the models into the output folder of make_kernels.py."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, model in kernels():
        content = model.SerializeToString(deterministic=True)
        (options.output_dir / f"{name}.onnx").write_bytes(content)


def kernels() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yields every model with the name of its file."""
    for name, element_type in FLOATS.items():
        for source, target in ((name, "float32"), ("float32", name)):
            types = (element_type, TensorProto.FLOAT)
            to_float32 = target == "float32"
            source_type, target_type = types if to_float32 else types[::-1]
            node = helper.make_node("Cast", ["source"], ["target"], to=target_type)
            yield f"cast_{source}_to_{target}", _model(node, source_type, target_type, "a", "a")
    for name, element_type in INTEGERS.items():
        node = helper.make_node("Transpose", ["source"], ["target"], perm=[0, 2, 1])
        yield f"transpose_{name}", _model(node, element_type, element_type, "nab", "nba")


def _model(
    node: onnx.NodeProto, source_type: int, target_type: int, source_axes: str, target_axes: str
) -> onnx.ModelProto:
    source = helper.make_tensor_value_info("source", source_type, list(source_axes))
    target = helper.make_tensor_value_info("target", target_type, list(target_axes))
    graph = helper.make_graph([node], "kernel", [source], [target])
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
