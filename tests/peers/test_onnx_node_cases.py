"""ONNX's own node test cases for Attention and TensorScatter, through the rewrites for each device.

A case's values become one attention layer in the form of our networks: queries, keys and values
come packed from a product, keys and values go into a cache in place, and scores get a bias. The
layer runs as it is, converted to float32 as on a CPU, and rewritten as on a GPU (on the CPU, with
ONNX Runtime's own operators). The expected values are those that the onnx package ships.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.node import attention, tensorscatter

from mpt_trt.engines.onnxruntime.cuda.attention import (
    attend_to_filled_cache,
    compute_attention_of_one_query,
    fuse_attention,
)
from mpt_trt.engines.onnxruntime.cuda.one_token import specialize_for_one_token
from mpt_trt.engines.onnxruntime.rewrites import compute_in_float32
from mpt_trt.engines.onnxruntime.session import session_options
from mpt_trt.network.graph import IR_VERSION, OPSET

EXPORTERS = ((attention, attention.Attention), (tensorscatter, tensorscatter.TensorScatter))
# Four dimensions, a float mask or none, a scale or none, and shared keys or not.
ATTENTION = [
    "attention_4d",
    "attention_4d_scaled",
    "attention_4d_attn_mask",
    "attention_4d_attn_mask_3d",
    "attention_4d_attn_mask_4d",
    "attention_4d_gqa",
    "attention_4d_gqa_scaled",
    "attention_4d_gqa_attn_mask",
    "attention_4d_fp16",
]
# Positions in a row, from a position per row on; cases that wrap around do not apply.
SCATTER = ["tensorscatter", "tensorscatter_3d"]
SPARE = 3
"""Positions of the cache after those in use."""


Values = tuple[onnx.NodeProto, list[NDArray], list[NDArray]]


@functools.cache
def all_cases() -> dict[str, Values]:
    """The node of every case with its inputs and expected outputs, by the name of the case."""
    found: dict[str, Values] = {}

    def record(
        node: onnx.NodeProto, inputs: list[NDArray], outputs: list[NDArray], name: str, **_: object
    ) -> None:
        found[name.removeprefix("test_")] = node, list(inputs), list(outputs)

    for module, exporter in EXPORTERS:
        with pytest.MonkeyPatch.context() as patch:
            # The package's functions pass their cases to this one.
            patch.setattr(module, "expect", record)
            for name in vars(exporter):
                if name.startswith("export"):
                    getattr(exporter, name)()
    return found


def values_of(name: str) -> Values:
    return all_cases()[name]


@dataclass(frozen=True)
class Case:
    """An attention case. bias: `[batch or 1, heads or 1, queries, keys]`."""

    query: NDArray
    keys: NDArray
    values: NDArray
    bias: NDArray
    scale: float
    expected: NDArray

    @classmethod
    def read(cls, name: str) -> Case:
        node, inputs, [expected, *_] = values_of(name)
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        assert set(attributes) <= {"scale"}, "a form that our networks do not use"
        query, keys, values, *mask = inputs
        shape = query.shape[2], keys.shape[2]
        bias = mask[0] if mask else np.zeros(shape, query.dtype)
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        scale = attributes.get("scale", query.shape[-1] ** -0.5)
        return cls(query, keys, values, bias, scale, expected)

    def of_query(self, at: int) -> Case:
        """The same with one of the queries."""
        one = slice(at, at + 1)
        return Case(
            self.query[:, :, one], self.keys, self.values, self.bias[:, :, one], self.scale,
            self.expected[:, :, one],
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Batch, query heads, key heads, queries, keys."""
        batch, heads, queries, _ = self.query.shape
        return batch, heads, self.keys.shape[1], queries, self.keys.shape[2]

    def network(self) -> onnx.ModelProto:
        """One attention layer, named and connected like those of our networks."""
        _, heads, kv_heads, queries, keys = self.sizes
        size, kind = self.query.shape[-1], helper.np_dtype_to_tensor_dtype(self.query.dtype)
        node, cache = helper.make_node, ["batch", kv_heads, keys + SPARE, size]
        heads_of_all = heads + 2 * kv_heads
        initializers = {
            "split_heads": [0, 0, heads_of_all, size],
            "sizes": [heads, kv_heads, kv_heads],
            "merged_heads": [0, 0, -1],
            "first": [0],
            "axis": [3],
        }
        nodes = [
            node("Reshape", ["packed", "split_heads"], ["by_head"], "by_head"),
            node("Transpose", ["by_head"], ["heads_first"], "heads_first", perm=[0, 2, 1, 3]),
            node("Split", ["heads_first", "sizes"], ["query", "key", "value"], "split", axis=1),
            node("Shape", ["past_key.0"], ["cache_shape"], "cache_shape", start=2, end=3),
            node("Squeeze", ["cache_shape"], ["cache_len"], "cache_len"),
            node("Unsqueeze", ["cache_len", "first"], ["last_key"], "last_key"),
            node("Slice", ["bias", "first", "last_key", "axis"], ["used_bias"], "used_bias"),
            *(
                node(
                    "TensorScatter",
                    [f"past_{name}.0", name, "write_positions"],
                    [f"present_{name}.0"],
                    f"scatter_{name}",
                    axis=-2,
                )
                for name in ("key", "value")
            ),
            node(
                "Attention",
                ["query", "present_key.0", "present_value.0", "used_bias"],
                ["context"],
                "attention",
                scale=self.scale,
            ),
            node("Transpose", ["context"], ["transposed"], "transposed", perm=[0, 2, 1, 3]),
            node("Reshape", ["transposed", "merged_heads"], ["logits"], "merged"),
        ]
        value, width = helper.make_tensor_value_info, heads_of_all * size
        inputs = [
            value("packed", kind, ["batch", queries, width]),
            value("bias", kind, [None, None, queries, keys + SPARE]),
            value("write_positions", TensorProto.INT64, ["batch"]),
            *(value(f"past_{name}.0", kind, cache) for name in ("key", "value")),
        ]
        outputs = [
            value("logits", kind, ["batch", queries, heads * size]),
            *(value(f"present_{name}.0", kind, cache) for name in ("key", "value")),
        ]
        constants = [
            numpy_helper.from_array(np.array(numbers, np.int64), name)
            for name, numbers in initializers.items()
        ]
        graph = helper.make_graph(nodes, "layer", inputs, outputs, constants)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def feeds(self) -> dict[str, NDArray]:
        """The last keys are the step's own; the earlier ones are in the cache, and noise after."""
        batch, _, _, queries, keys = self.sizes
        packed = [self.query, self.keys[:, :, -queries:], self.values[:, :, -queries:]]
        packed = np.concatenate(packed, axis=1).transpose(0, 2, 1, 3).reshape(batch, queries, -1)
        feeds = {"packed": packed, "write_positions": np.full(batch, keys - queries, np.int64)}
        for name, held in (("key", self.keys), ("value", self.values)):
            cache = np.full((*held.shape[:2], keys + SPARE, held.shape[3]), 9, held.dtype)
            cache[:, :, : keys - queries] = held[:, :, : keys - queries]
            feeds[f"past_{name}.0"] = cache
        hidden = np.full((*self.bias.shape[:3], SPARE), -np.inf, self.bias.dtype)
        feeds["bias"] = np.concatenate([self.bias, hidden], axis=3)
        return feeds

    def require(self, outputs: dict[str, NDArray], bound: float) -> None:
        """Compares the context, and the cache that the step has filled."""
        _, _, _, queries, keys = self.sizes
        merged = self.expected.transpose(0, 2, 1, 3).reshape(len(self.expected), queries, -1)
        np.testing.assert_allclose(
            outputs["logits"].reshape(merged.shape).astype(np.float32),
            merged.astype(np.float32),
            atol=bound,
        )
        for name, held in (("key", self.keys), ("value", self.values)):
            filled = outputs[f"present_{name}.0"][:, :, :keys]
            np.testing.assert_allclose(filled.astype(np.float32), held.astype(np.float32))


def run(
    model: onnx.ModelProto, feeds: dict[str, NDArray], options: onnxruntime.SessionOptions
) -> dict[str, NDArray]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {each.name: feeds[each.name] for each in session.get_inputs()}
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


def options_of(folder: Path) -> onnxruntime.SessionOptions:
    options = session_options(folder / "rank0.onnx")
    options.intra_op_num_threads = 1
    return options


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_on_a_cpu(name: str, tmp_path: Path) -> None:
    """Converted to float32, as every network is on a CPU."""
    case, options = Case.read(name), options_of(tmp_path)
    model, feeds = case.network(), case.feeds()
    if case.query.dtype == np.float16:
        kept = compute_in_float32(model, TensorProto.FLOAT16, tmp_path, options)
        assert kept == []
        feeds = {
            name: value.astype(np.float32) if value.dtype == np.float16 else value
            for name, value in feeds.items()
        }
    case.require(run(model, feeds, options), 1e-3 if "fp16" in name else 1e-5)


@pytest.mark.parametrize("name", [name for name in ATTENTION if "fp16" not in name])
def test_prefill_attention_of_a_gpu(name: str, tmp_path: Path) -> None:
    """Over the filled positions only, and fused if keys have as many heads as queries."""
    case = Case.read(name)
    model, feeds = case.network(), case.feeds()
    attend_to_filled_cache(model)
    fuse_attention(model)
    _, heads, kv_heads, _, keys = case.sizes
    fused = [node for node in model.graph.node if node.op_type == "MultiHeadAttention"]
    assert len(fused) == (heads == kv_heads)
    feeds["key_length"] = np.array([keys], np.int64)
    case.require(run(model, feeds, options_of(tmp_path)), 1e-5)


@pytest.mark.parametrize("name", [name for name in ATTENTION if "fp16" not in name])
@pytest.mark.parametrize("at", [0, 3])
def test_attention_of_one_query_of_a_gpu(name: str, at: int, tmp_path: Path) -> None:
    """One query per row, with ONNX Runtime's operator or two products and a softmax."""
    case = Case.read(name).of_query(at)
    model = case.network()
    specialize_for_one_token(model)
    compute_attention_of_one_query(model)
    assert "Attention" not in {node.op_type for node in model.graph.node}
    case.require(run(model, case.feeds(), options_of(tmp_path)), 1e-5)


@pytest.mark.parametrize("name", SCATTER)
@pytest.mark.parametrize("is_in_place", [False, True])
def test_scatter(name: str, is_in_place: bool) -> None:
    """In place, the past and the present cache share a buffer, as in an engine."""
    node, [past, update, positions], [expected] = values_of(name)
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    assert attributes.pop("mode", b"linear") == b"linear"
    value, kind = helper.make_tensor_value_info, TensorProto.FLOAT
    axis = attributes.get("axis", -2)
    made = helper.make_node("TensorScatter", ["past", "new", "at"], ["present"], axis=axis)
    inputs = [
        value("past", kind, past.shape),
        value("new", kind, update.shape),
        value("at", TensorProto.INT64, positions.shape),
    ]
    graph = helper.make_graph([made], "cache", inputs, [value("present", kind, past.shape)])
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    of = onnxruntime.OrtValue.ortvalue_from_numpy
    buffer = of(past.copy())
    result = buffer if is_in_place else of(np.zeros_like(past))
    binding = session.io_binding()
    binding.bind_ortvalue_input("past", buffer)
    binding.bind_ortvalue_input("new", of(update))
    binding.bind_ortvalue_input("at", of(positions))
    binding.bind_ortvalue_output("present", result)
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(result.numpy(), expected)


def test_every_case_is_used_or_named() -> None:
    """A new version of onnx may bring cases in the forms that our networks use."""
    fitting = set()
    for case, (node, inputs, outputs) in all_cases().items():
        if node.op_type != "Attention" or inputs[0].ndim != 4:
            continue
        names = {each.name for each in node.attribute}
        is_float = all(each.dtype in (np.float32, np.float16) for each in inputs)
        if names <= {"scale"} and len(inputs) in (3, 4) and len(outputs) == 1 and is_float:
            query, _, values = inputs[:3]
            if query.shape[-1] == values.shape[-1]:
                fitting.add(case)
    assert fitting == set(ATTENTION)
