"""KV cache of a network under ONNX Runtime on a CPU.

A step reads its buffers completely. So they are only as long as the filled positions, rounded up to
a multiple of POSITIONS_AT_ONCE, and the loaded network accepts any length.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import DTypeLike, NDArray
from onnx import helper

from mpt_trt.network.kv_cache import QUANTIZED_TYPES, CacheShape, cache_names
from mpt_trt.quantization.schemes import KvCacheType

Binding: TypeAlias = onnxruntime.IOBinding

POSITIONS_AT_ONCE = 64
# Axis of positions in a layer's keys or values.
POSITIONS_AXIS = 2


def take_any_cache_length(model: onnx.ModelProto) -> None:
    """Turns the number of cache positions from a constant into an input dimension.

    The graph reads the number from the buffers' shape.
    """
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_", "present_")):
            value.type.tensor_type.shape.dim[POSITIONS_AXIS].dim_param = "cache_len"


class CpuCache(Protocol):
    """A cache whose buffers are bound to a session."""

    def start(self, batch_size: int) -> None:
        """Empties the cache and gives it `batch_size` rows."""
        ...

    def before_step(self, seq: int, write_positions: NDArray[np.int64]) -> None:
        """Prepares for a step of `seq` tokens per row."""
        ...

    def after_step(self, write_positions: NDArray[np.int64]) -> None:
        """Stores the keys and values that the step has computed."""
        ...

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Makes row i a copy of the old row `rows[i]`."""
        ...

    def select_rows(self, first: int, count: int) -> None:
        """Limits the following steps to `count` rows from `first` on."""
        ...

    def copy_row(self, source: int, target: int) -> None:
        """Makes row `target` a copy of row `source`."""
        ...


class InPlaceCache:
    """A cache that each step updates in place: every buffer is an input and an output."""

    def __init__(self, binding: Binding, shape: CacheShape, element_type: int):
        self._binding, self._shape, self._element_type = binding, shape, element_type
        self._dtype = helper.tensor_dtype_to_np_dtype(element_type)
        self._buffers = _no_rows(shape, self._dtype)
        self._selected = slice(0, 0)

    def start(self, batch_size: int) -> None:
        """Empties the cache and gives it `batch_size` rows."""
        self._buffers = _zeros(self._shape, batch_size, _in_use(self._shape, 0), self._dtype)
        self.select_rows(0, batch_size)

    def before_step(self, seq: int, write_positions: NDArray[np.int64]) -> None:
        """Prepares for a step of `seq` tokens per row."""
        positions = _in_use(self._shape, int(write_positions.max()) + seq)
        if positions > _length(self._buffers):
            self._buffers = _lengthened(self._buffers, positions)
            self._bind()

    def after_step(self, write_positions: NDArray[np.int64]) -> None:
        """Does nothing, because the step has updated the cache."""

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Makes row i a copy of the old row `rows[i]`."""
        self._buffers = np.take(self._buffers, rows, axis=1)
        self.select_rows(0, len(rows))

    def select_rows(self, first: int, count: int) -> None:
        """Limits the following steps to `count` rows from `first` on."""
        self._selected = slice(first, first + count)
        self._bind()

    def copy_row(self, source: int, target: int) -> None:
        """Makes row `target` a copy of row `source`."""
        self._buffers[:, target] = self._buffers[:, source]

    def _bind(self) -> None:
        past, present = (cache_names(age, self._shape.num_layers) for age in ("past", "present"))
        parts = _parts(self._buffers[:, self._selected], self._element_type)
        for old, new, part in zip(past, present, parts, strict=True):
            self._binding.bind_ortvalue_input(old, part)
            self._binding.bind_ortvalue_output(new, part)


class CopiedCache:
    """A quantized cache. The keys and values of a step are copied into it after the step.

    All layers share one array, like the cache, so each row needs one copy.
    """

    def __init__(self, binding: Binding, shape: CacheShape, cache_type: KvCacheType):
        self._binding, self._shape = binding, shape
        self._element_type = QUANTIZED_TYPES[cache_type][0]
        self._buffers = self._new = _no_rows(shape, np.uint8)
        self._selected = slice(0, 0)

    def start(self, batch_size: int) -> None:
        """Empties the cache and gives it `batch_size` rows."""
        self._buffers = _zeros(self._shape, batch_size, _in_use(self._shape, 0), np.uint8)
        self.select_rows(0, batch_size)

    def before_step(self, seq: int, write_positions: NDArray[np.int64]) -> None:
        """Prepares for a step of `seq` tokens per row."""
        rows = self._selected.stop - self._selected.start
        # A step reads the positions before it.
        self._lengthen(int(write_positions.max()))
        if (self._new.shape[1], _length(self._new)) != (rows, seq):
            self._new = _zeros(self._shape, rows, seq, np.uint8)
            self._bind("new", self._new)

    def after_step(self, write_positions: NDArray[np.int64]) -> None:
        """Stores the keys and values that the step has computed."""
        seq = _length(self._new)
        self._lengthen(int(write_positions.max()) + seq)
        selected = self._buffers[:, self._selected]
        for row, start in enumerate(write_positions):
            selected[:, row, :, start : start + seq] = self._new[:, row]

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Makes row i a copy of the old row `rows[i]`."""
        self._buffers = np.take(self._buffers, rows, axis=1)
        self.select_rows(0, len(rows))

    def select_rows(self, first: int, count: int) -> None:
        """Limits the following steps to `count` rows from `first` on."""
        self._selected = slice(first, first + count)
        self._bind("past", self._buffers[:, self._selected])

    def copy_row(self, source: int, target: int) -> None:
        """Makes row `target` a copy of row `source`."""
        self._buffers[:, target] = self._buffers[:, source]

    def _lengthen(self, used: int) -> None:
        positions = _in_use(self._shape, used)
        if positions > _length(self._buffers):
            self._buffers = _lengthened(self._buffers, positions)
            self._bind("past", self._buffers[:, self._selected])

    def _bind(self, age: str, array: NDArray[np.uint8]) -> None:
        bind = self._binding.bind_ortvalue_input
        if age == "new":
            bind = self._binding.bind_ortvalue_output
        names = cache_names(age, self._shape.num_layers)
        for name, part in zip(names, _parts(array, self._element_type), strict=True):
            bind(name, part)


def make_cpu_cache(
    binding: Binding, shape: CacheShape, cache_type: KvCacheType, element_type: int
) -> CpuCache:
    """Makes a session's cache. element_type: type of the network, for an unquantized cache."""
    if cache_type == "auto":
        return InPlaceCache(binding, shape, element_type)
    return CopiedCache(binding, shape, cache_type)


# All layers' keys and values are one array, `[2 * layers, rows, kv_heads, positions, head_dim]`.


def _zeros(shape: CacheShape, rows: int, positions: int, dtype: DTypeLike) -> NDArray:
    dimensions = (2 * shape.num_layers, rows, shape.num_kv_heads, positions, shape.head_dim)
    return np.zeros(dimensions, dtype)


def _no_rows(shape: CacheShape, dtype: DTypeLike) -> NDArray:
    return _zeros(shape, 0, 0, dtype)


def _length(array: NDArray) -> int:
    return array.shape[1 + POSITIONS_AXIS]


def _in_use(shape: CacheShape, used: int) -> int:
    """Length of a buffer for `used` positions; at most that of the cache."""
    steps = max(-(-used // POSITIONS_AT_ONCE), 1)
    return min(steps * POSITIONS_AT_ONCE, shape.cache_len)


def _lengthened(array: NDArray, positions: int) -> NDArray:
    """Extends the array with zeros after its last positions."""
    dimensions = list(array.shape)
    dimensions[1 + POSITIONS_AXIS] = positions
    longer = np.zeros(dimensions, array.dtype)
    longer[:, :, :, : _length(array)] = array
    return longer


def _parts(array: NDArray, element_type: int) -> list[onnxruntime.OrtValue]:
    """Views the keys and values of every layer, in the array's memory."""
    as_value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    return [as_value(part, element_type) for part in array]
