"""KV cache of an engine in GPU memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.cuda.memory import Block, DeviceBuffer, copy_block
from mpt_trt.errors import MptTrtError
from mpt_trt.network.kv_cache import CacheShape, cache_names
from mpt_trt.quantization.schemes import KvCacheType

# Least alignment of the addresses that TensorRT takes (IExecutionContext::setTensorAddress).
ALIGNMENT = 256

SetAddress = Callable[[str, int], None]
"""Function that passes the address of one of the network's values to the runtime, by name."""


class DeviceCache(Protocol):
    """A cache whose buffers are bound to the runtime."""

    @property
    def place(self) -> tuple[int, int]:
        """Number of the buffers, and the first selected row.

        Steps at the same place use the same memory. Places are the same on all ranks, which must
        capture and replay the same steps, while addresses may differ.
        """
        ...

    def start(self, batch_size: int, stream: Any) -> None:
        """Empties the cache and gives it `batch_size` rows."""
        ...

    def before_step(self, seq: int) -> None:
        """Prepares for a step of `seq` tokens per row."""
        ...

    def after_step(self, write_positions: NDArray[np.int64], stream: Any) -> None:
        """Stores the keys and values that the step has computed."""
        ...

    def reorder(self, rows: NDArray[np.int64], stream: Any) -> None:
        """Makes row i a copy of the old row `rows[i]`."""
        ...

    def select_rows(self, first: int, count: int) -> None:
        """Limits the following steps to `count` rows from `first` on.

        Raises MptTrtError when that row does not start at a multiple of ALIGNMENT.
        """
        ...

    def copy_row(self, source: int, target: int, stream: Any) -> None:
        """Makes row `target` a copy of row `source`."""
        ...


class _Array:
    """Bytes `[2 * layers, rows * kv_heads, positions * head bytes]` in one buffer.

    Rows of padding follow each part (keys or values of a layer) where the next one would not start
    at a multiple of ALIGNMENT. number: identifies the array among those of its cache.
    """

    def __init__(self, shape: CacheShape, head_bytes: int, rows: int, positions: int, number: int):
        self.number = number
        self.parts, self.rows, self.positions = 2 * shape.num_layers, rows, positions
        self.head_bytes, self.kv_heads = head_bytes, shape.num_kv_heads
        self._width = positions * head_bytes
        multiple = ALIGNMENT // math.gcd(ALIGNMENT, self._width)
        self._height = multiple * math.ceil(rows * self.kv_heads / multiple)
        self.buffer = DeviceBuffer(self.parts * self._height * self._width)

    def bind(self, names: list[str], set_address: SetAddress, first_row: int = 0) -> None:
        """Binds the parts (keys and values of every layer), from a row on.

        names: names of the parts, in order.
        """
        start = self.row_address(first_row)
        for part, name in enumerate(names):
            set_address(name, start + part * self._height * self._width)

    def row_address(self, row: int) -> int:
        """Address of a row of the first part."""
        return self.buffer.address + row * self.kv_heads * self._width

    def block(self, row: int, position: int) -> Block:
        """The box that starts at a row and a position."""
        return Block(
            self.buffer.address,
            height=self._height,
            width=self._width,
            start=(0, row * self.kv_heads, position * self.head_bytes),
        )

    def copy_row(self, row: int, source: _Array, source_row: int, stream: Any) -> None:
        """Copies a row of an array with the same number of positions."""
        extent = (self.parts, self.kv_heads, self.positions * self.head_bytes)
        copy_block(source.block(source_row, 0), self.block(row, 0), extent, stream)


class _Buffers:
    """Keys and values of all earlier positions, for both kinds of cache."""

    def __init__(self, shape: CacheShape, element_bytes: int, set_address: SetAddress):
        self._shape, self._set_address = shape, set_address
        self._head_bytes = shape.head_dim * element_bytes
        self._kept: _Array | None = None
        # Beam search copies rows back and forth between the two.
        self._spare: _Array | None = None
        self._arrays_made = 0
        # The rows that steps run on.
        self._first = self._count = 0

    def start(self, batch_size: int, stream: Any) -> None:
        """Empties the cache and gives it `batch_size` rows."""
        # Old values are overwritten before they are read. So buffers with the right number of rows
        # are kept, and with them the captured graphs.
        self._spare = None
        if self._kept is None or self._kept.rows != batch_size:
            # Frees the old buffers before allocating new ones.
            self._kept = None
            self._kept = self._array(batch_size, self._shape.cache_len)
        self.select_rows(0, batch_size)

    @property
    def place(self) -> tuple[int, int]:
        """Number of the buffers, and the first selected row; see `DeviceCache.place`."""
        return self._filled.number, self._first

    def reorder(self, rows: NDArray[np.int64], stream: Any) -> None:
        """Makes row i a copy of the old row `rows[i]`."""
        if self._spare is None or self._spare.rows != len(rows):
            self._spare = None
            self._spare = self._array(len(rows), self._shape.cache_len)
        old, new = self._filled, self._spare
        for target, source in enumerate(rows):
            new.copy_row(target, old, int(source), stream)
        self._kept, self._spare = new, old
        self.select_rows(0, len(rows))

    def select_rows(self, first: int, count: int) -> None:
        """Limits the following steps to `count` rows from `first` on."""
        kept = self._filled
        row_bytes = kept.row_address(1) - kept.row_address(0)
        if first * row_bytes % ALIGNMENT:
            raise MptTrtError(
                f"a cache row has {row_bytes} bytes per layer, and a GPU can only start at a "
                f"multiple of {ALIGNMENT}: requests cannot join a running batch; build with a "
                "max_input_len + max_output_len that is a multiple of 256"
            )
        self._first, self._count = first, count
        self._bind(kept)

    def copy_row(self, source: int, target: int, stream: Any) -> None:
        """Makes row `target` a copy of row `source`."""
        self._filled.copy_row(target, self._filled, source, stream)

    @property
    def _filled(self) -> _Array:
        if self._kept is None:
            raise RuntimeError("the cache has no rows before `start`")
        return self._kept

    def _array(self, rows: int, positions: int) -> _Array:
        self._arrays_made += 1
        return _Array(self._shape, self._head_bytes, rows, positions, self._arrays_made)

    def _bind(self, array: _Array) -> None:
        names = cache_names("past", self._shape.num_layers)
        array.bind(names, self._set_address, self._first)


class InPlaceCache(_Buffers):
    """A cache that each step updates in place: every buffer is an input and an output."""

    def before_step(self, seq: int) -> None:
        """Does nothing, because the buffers stay bound."""

    def after_step(self, write_positions: NDArray[np.int64], stream: Any) -> None:
        """Does nothing, because the step has updated the cache."""

    def _bind(self, array: _Array) -> None:
        super()._bind(array)
        names = cache_names("present", self._shape.num_layers)
        array.bind(names, self._set_address, self._first)


class CopiedCache(_Buffers):
    """A quantized cache, one byte per element. A step's keys and values are copied into it.

    All layers share one array, so rows that write at the same position need one copy, and other
    rows one each.
    """

    def __init__(self, shape: CacheShape, set_address: SetAddress):
        super().__init__(shape, 1, set_address)
        # Keyed by (rows, seq), because a captured step always writes to the same address.
        self._new: dict[tuple[int, int], _Array] = {}
        self._seq = 0

    def before_step(self, seq: int) -> None:
        """Prepares for a step of `seq` tokens per row."""
        key = (self._count, seq)
        if key not in self._new:
            # Arrays for several tokens (pieces of a prompt) are mostly used once.
            self._new = {k: array for k, array in self._new.items() if k[1] == 1}
            self._new[key] = self._array(*key)
        self._new[key].bind(cache_names("new", self._shape.num_layers), self._set_address)
        self._seq = seq

    def after_step(self, write_positions: NDArray[np.int64], stream: Any) -> None:
        """Copies the keys and values that the step has computed into the cache."""
        kept = self._filled
        new, first = self._new[self._count, self._seq], self._first
        width = self._seq * self._head_bytes
        if len(set(write_positions.tolist())) == 1:
            extent = (kept.parts, self._count * kept.kv_heads, width)
            position = int(write_positions[0])
            copy_block(new.block(0, 0), kept.block(first, position), extent, stream)
            return
        for row, position in enumerate(write_positions.tolist()):
            extent = (kept.parts, kept.kv_heads, width)
            copy_block(new.block(row, 0), kept.block(first + row, position), extent, stream)


def make_device_cache(
    shape: CacheShape, cache_type: KvCacheType, element_bytes: int, set_address: SetAddress
) -> DeviceCache:
    """Makes a cache. element_bytes: bytes of the network's own type."""
    if cache_type == "auto":
        return InPlaceCache(shape, element_bytes, set_address)
    return CopiedCache(shape, set_address)
