"""Products with 4-bit weights in groups, after activation-aware scaling (AWQ).

A product's input is multiplied by the pre-quant scale of its layer, by which the weights have been
divided. Where the input comes from a norm, the norm's weight and bias take the factor; where it is
the attention's output, V's columns do, if each has one use and nothing lies between; only before
the last matrix of a block, behind GELU, does a node of the network multiply.

Integers: round(weight / scale) in -8..7 with scale = amax / 7, as ModelOpt's own fake quantization
has them. (TensorRT-LLM's 2023 loader recomputed amax / 8 from the same npz, where the largest
positive weight of a group saturates.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpt_trt.arrays.cast import STORAGE_TYPES, convert, one_thread_session, transposed_copy
from mpt_trt.calibration.npz_file import CalibrationResult
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import held
from mpt_trt.model import sharding
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import Weight, preceding_norm
from mpt_trt.network.graph import ELEMENT_TYPES, IR_VERSION, OPSET, GraphBuilder, StoredTensor
from mpt_trt.network.linear.base import (
    dequantized,
    ft_tensors,
    linear_weights,
    made,
    place,
    scaled_input,
)
from mpt_trt.quantization import integers
from mpt_trt.quantization.integers import BLOCK_ELEMENTS, FLOAT32
from mpt_trt.quantization.schemes import KvCacheType, folds_into_values, require_fitting_groups

QKV, DENSE = "attention.query_key_value", "attention.dense"
# Rows of a matrix that are packed at a time: a cache line of each column's integers.
BLOCK_ROWS = 128

Factor = Callable[[], NDArray[np.float32]]
"""A vector that is read from the calibration result when a file is written."""


class AwqLinear:
    """See `LinearLayers`.

    Raises MptTrtError when the calibration's groups do not fit the ranks.
    """

    def __init__(
        self,
        checkpoint: FtCheckpoint,
        rank: Rank,
        calibration: CalibrationResult,
        kv_cache: KvCacheType,
    ):
        config, group_size = checkpoint.config, calibration.group_size
        if group_size is None:
            raise ValueError(f"{calibration.path}: no result of int4_awq")
        if group_size % 2:
            raise calibration.file.refused(f"groups of {group_size} are not of an even size")
        try:
            require_fitting_groups(config, rank.tp_size, group_size)
        except MptTrtError as error:
            raise MptTrtError(f"{calibration.path}: {error}") from None
        self._checkpoint, self._rank, self._calibration = checkpoint, rank, calibration
        self._group_size = group_size
        self._weights = linear_weights(config)
        self._folds_into_values = folds_into_values(config, kv_cache)

    def tensors(self) -> dict[str, StoredTensor]:
        found = ft_tensors(self._checkpoint, self._rank)
        for name, weight in self._weights.items():
            del found[weight.name]
            found |= self._matrix(name, weight)
            found |= self._takers_of_scale(name, weight, found)
        return found

    def emit(self, graph: GraphBuilder, name: str, value: str) -> str:
        value = scaled_input(graph, name, value)
        weight = dequantized(graph, name, axis=0, block_size=self._group_size)
        return graph.node("MatMul", [value, weight], name)

    def _matrix(self, name: str, weight: Weight) -> dict[str, StoredTensor]:
        rank = self._rank.index
        height, width = self._checkpoint.file_of(weight, self._rank).shape
        element_type = ELEMENT_TYPES[self._checkpoint.storage_type]
        return {
            f"{weight.name}.quantized": made(
                f"{weight.name}.int4.{rank}",
                TensorProto.INT4,
                (height, width),
                functools.partial(self._integers, name, weight),
            ),
            f"{weight.name}.scale": made(
                f"{weight.name}.scale.{rank}",
                element_type,
                (height // self._group_size, width),
                functools.partial(self._scales, name, weight),
            ),
        }

    def _integers(self, name: str, weight: Weight) -> Iterator[NDArray]:
        rows, columns = held(self._checkpoint.config, weight, self._rank)
        packed = np.empty((len(columns), sum(map(len, rows)) // 2), np.uint8)
        start = 0
        for block, scales in held_blocks(self._calibration, name, rows, columns):
            stop = start + len(block) // 2
            _quantize_into(packed[:, start:stop], block, scales)
            start = stop
        yield packed

    def _scales(self, name: str, weight: Weight) -> Iterator[NDArray]:
        rows, columns = held(self._checkpoint.config, weight, self._rank)
        groups = self._groups(columns)
        whole = self._calibration.awq_scales(*place(name))
        found = np.concatenate([whole[part.start : part.stop, groups] for part in rows]).T
        if name.endswith(QKV) and self._folds_into_values:
            found = found * self._factor_of_qkv(name.replace(QKV, DENSE))
        dtype = STORAGE_TYPES[self._checkpoint.storage_type]
        yield integers.stored_scales(np.ascontiguousarray(found, np.float32), dtype)

    def _groups(self, columns: sharding.Range) -> slice:
        return slice(columns.start // self._group_size, columns.stop // self._group_size)

    def _takers_of_scale(
        self, name: str, weight: Weight, found: dict[str, StoredTensor]
    ) -> dict[str, StoredTensor]:
        """The tensors that take the pre-quant scale of layer `name`; found: those before it."""
        if (norm := preceding_norm(weight)) is not None:
            factor = functools.partial(self._pre_quant_scale, name)
            parts = [f"{norm}.{part}" for part in ("weight", "bias") if f"{norm}.{part}" in found]
            return {part: self._times(found[part], part, factor) for part in parts}
        if not (name.endswith(DENSE) and self._folds_into_values):
            return {f"{name}.pre_quant_scale": self._stored_scale(name, weight)}
        bias = f"{name.replace(DENSE, QKV)}.bias"
        if bias not in found:
            return {}
        factor = functools.partial(self._factor_of_qkv, name)
        return {bias: self._times(found[bias], f"{bias}.{self._rank.index}", factor)}

    def _times(self, stored: StoredTensor, name: str, factor: Factor) -> StoredTensor:
        """An FT file of one dimension, times a vector."""
        dtype = STORAGE_TYPES[self._checkpoint.storage_type]

        def pieces() -> Iterator[NDArray]:
            values = convert(np.fromfile(stored.content, dtype), FLOAT32)
            yield convert(values * factor(), dtype)

        return made(f"{name}.scaled", stored.element_type, stored.shape, pieces)

    def _stored_scale(self, name: str, weight: Weight) -> StoredTensor:
        storage_type = self._checkpoint.storage_type

        def pieces() -> Iterator[NDArray]:
            yield convert(self._pre_quant_scale(name), STORAGE_TYPES[storage_type])

        file_name = f"{name}.pre_quant_scale.{self._rank.index}"
        size = self._checkpoint.file_of(weight, self._rank).shape[0]
        return made(file_name, ELEMENT_TYPES[storage_type], (size,), pieces)

    def _pre_quant_scale(self, name: str) -> NDArray[np.float32]:
        """The rank's part, float32 `[in_features]`."""
        _, columns = held(self._checkpoint.config, self._weights[name], self._rank)
        whole = self._calibration.pre_quant_scale(*place(name))
        return whole[columns.start : columns.stop]

    def _factor_of_qkv(self, dense: str) -> NDArray[np.float32]:
        """1 for the rank's columns of Q and K; for those of V, the scale of layer `dense`."""
        query, key, _ = sharding.qkv_columns(self._checkpoint.config, self._rank)
        ones = np.ones(len(query) + len(key), np.float32)
        return np.concatenate([ones, self._pre_quant_scale(dense)])


def held_blocks(
    calibration: CalibrationResult, name: str, rows: list[sharding.Range], columns: sharding.Range
) -> Iterator[tuple[NDArray, NDArray[np.float32]]]:
    """A rank's part of the matrix of layer `name`, BLOCK_ROWS rows at a time, and their scales.

    Each block is valid until the next one is asked for.
    """
    group_size = calibration.group_size
    groups = slice(columns.start // group_size, columns.stop // group_size)
    whole = calibration.awq_scales(*place(name))
    scales = np.concatenate([whole[part.start : part.stop, groups] for part in rows])
    parts = _held_parts(calibration.awq_rows(*place(name), BLOCK_ROWS), rows, columns)
    start = 0
    for block in _joined(parts, BLOCK_ROWS):
        yield block, scales[start : start + len(block)]
        start += len(block)


def _held_parts(
    blocks: Iterator[NDArray], rows: list[sharding.Range], columns: sharding.Range
) -> Iterator[NDArray]:
    """What a rank holds of successive rows of a matrix. rows: in ascending order."""
    start = 0
    for block in blocks:
        for part in rows:
            held_rows = block[max(part.start - start, 0) : max(part.stop - start, 0)]
            yield held_rows[:, columns.start : columns.stop]
        start += len(block)


def _joined(parts: Iterator[NDArray], number: int) -> Iterator[NDArray]:
    """The same rows, so many at a time, where need be in memory that is used again."""
    block, filled = np.empty((0, 0)), 0
    for part in parts:
        rest = part
        if not filled and len(rest) == number:
            yield rest
            continue
        while len(rest):
            if not block.size:
                block = np.empty((number, rest.shape[1]), rest.dtype)
            taken = rest[: number - filled]
            np.copyto(block[filled : filled + len(taken)], taken, casting="safe")
            filled, rest = filled + len(taken), rest[len(taken) :]
            if filled == number:
                yield block
                filled = 0
    if filled:
        yield block[:filled]


def _quantize_into(target: NDArray[np.uint8], rows: NDArray, scales: NDArray[np.float32]) -> None:
    """Fills `target` `[in, out / 2]` with the integers of an even number of rows `[out, in]`.

    scales: as in `quantized_rows`. Pairs are packed before they are transposed: half the bytes.
    """
    group_size = rows.shape[1] // scales.shape[1]
    groups = max(1, BLOCK_ELEMENTS // (BLOCK_ROWS * group_size))
    for start in range(0, scales.shape[1], groups):
        part = slice(start * group_size, (start + groups) * group_size)
        integers_of_part = quantized_rows(rows[:, part], scales[:, start : start + groups])
        target[part] = transposed_copy(integers.pack_int4_rows(integers_of_part))


def quantized_rows(weight: NDArray, scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """round(weight / scale), halves to even, in -8..7.

    weight: `[out_features, in_features]`. scales: `[out_features, in_features / group_size]`.
    """
    nonzero = np.where(scales == 0, np.float32(1), scales)
    found = np.empty(weight.shape, np.int8)
    quantizer = _quantizer(weight.shape[1] // max(1, scales.shape[1]))
    step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        rows = convert(np.ascontiguousarray(weight[part]), FLOAT32)
        [rounded] = quantizer.run(None, {"weight": rows, "scales": nonzero[part]})
        np.clip(rounded, -8, 7, out=found[part])
    return found


@functools.cache
def _quantizer(group_size: int) -> onnxruntime.InferenceSession:
    """round(weight / scale), halves to even, within int8, in one pass over the weights."""
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
