"""The key-value cache of an engine, in GPU memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from mpt_trt.engines.device_buffer import Block, DeviceBuffer, call, copy_block
from mpt_trt.kv_cache import CacheShape, cache_names
from mpt_trt.quantization.scheme import KvCacheType

BindBuffer = Callable[[str, int, tuple[int, ...]], None]
"""Tells the runtime where a value of the network lies, and its shape."""

PositionsFor = Callable[[int, int], int]
"""How many positions the buffers have, of those that are used and those that they may have."""

LEAST_POSITIONS = 128


def all_positions(used: int, cache_len: int) -> int:
    """For runtimes in which the buffers' shape is fixed."""
    return cache_len


def positions_in_use(used: int, cache_len: int) -> int:
    """The least of 128, 192, 256, 384, 512, 768, ... that is enough, and no more than there may be.

    A step reads all of the buffers that it is given; what runs for every length has to be captured
    anew. So there are few lengths, of which at most a third is not in use, from 128 on.
    """
    power = LEAST_POSITIONS
    while power < used:
        power *= 2
    between = power * 3 // 4
    enough = between if LEAST_POSITIONS < used <= between else power
    return min(enough, cache_len)


class DeviceCache(Protocol):
    """A cache whose buffers are bound to the runtime."""

    @property
    def address(self) -> int:
        """Where the buffers begin, 0 before the first start."""
        ...

    @property
    def positions(self) -> int:
        """Of the buffers, of each row and head."""
        ...

    def start(self, batch_size: int, stream: Any) -> None:
        """Makes it `batch_size` empty rows."""
        ...

    def before_step(self, seq: int, write_positions: NDArray[np.int64], stream: Any) -> None:
        """Prepares for a step of `seq` tokens a row, from those positions on."""
        ...

    def after_step(self, write_positions: NDArray[np.int64], stream: Any) -> None:
        """Takes in what the step has computed."""
        ...

    def reorder(self, rows: NDArray[np.int64], stream: Any) -> None:
        """Row i becomes a copy of old row rows[i]."""
        ...


class _Array:
    """Bytes `[2 * layers, rows, kv_heads, positions, head bytes]` at the start of one buffer.

    positions: as many as the buffer has room for, until there are said to be fewer.
    """

    def __init__(self, shape: CacheShape, head_bytes: int, rows: int, positions: int):
        self.rows, self.positions, self.head_bytes = rows, positions, head_bytes
        self.parts, self.heads = 2 * shape.num_layers, rows * shape.num_kv_heads
        self._shape = shape
        self.buffer = DeviceBuffer(self.parts * self._part_bytes(positions))

    def bind(self, names: list[str], bind: BindBuffer) -> None:
        """names: of the parts, in order."""
        shape = self._shape
        dimensions = (self.rows, shape.num_kv_heads, self.positions, shape.head_dim)
        for part, name in enumerate(names):
            bind(name, self.buffer.address + part * self._part_bytes(self.positions), dimensions)

    def block(self, row: int, position: int) -> Block:
        """The box that begins with a row and a position, as `[parts, rows * heads, bytes]`."""
        return Block(
            self.buffer.address,
            height=self.heads,
            width=self.positions * self.head_bytes,
            start=(0, row * self._shape.num_kv_heads, position * self.head_bytes),
        )

    def copy_row(self, row: int, source: _Array, source_row: int, stream: Any) -> None:
        """Copies a row of an array of the same number of positions."""
        extent = (self.parts, self._shape.num_kv_heads, self.positions * self.head_bytes)
        copy_block(source.block(source_row, 0), self.block(row, 0), extent, stream)

    def lengthen(self, positions: int, stream: Any) -> None:
        """Moves what is there, within the buffer, so that every row has more positions.

        What the new ones hold was a key or a value once, or is 0: a finite number in any case.
        """
        old, new = (self._part_bytes(length) for length in (self.positions, positions))
        extent = (1, self.heads, self.positions * self.head_bytes)
        aside = DeviceBuffer(old)
        # The last part first: where a part comes to lie, none is that has not been moved.
        for part in reversed(range(self.parts)):
            there = self._rows_of_heads(aside.address, self.positions)
            for source, target in (
                (self._rows_of_heads(self.buffer.address + part * old, self.positions), there),
                (there, self._rows_of_heads(self.buffer.address + part * new, positions)),
            ):
                copy_block(source, target, extent, stream)
        # Before the memory beside is freed.
        call(cudart.cudaStreamSynchronize(stream))
        self.positions = positions

    def _rows_of_heads(self, address: int, positions: int) -> Block:
        """A part, as `[1, rows * heads, bytes]`."""
        return Block(address, self.heads, positions * self.head_bytes, start=(0, 0, 0))

    def _part_bytes(self, positions: int) -> int:
        return self.heads * positions * self.head_bytes


class _Buffers:
    """What both kinds of cache have: the array of what is kept, and its rows."""

    def __init__(
        self, shape: CacheShape, element_bytes: int, positions_for: PositionsFor, bind: BindBuffer
    ):
        self._shape, self._positions_for, self._bind = shape, positions_for, bind
        self._head_bytes = shape.head_dim * element_bytes
        self._kept: _Array | None = None

    def start(self, batch_size: int, stream: Any) -> None:
        # What a row held is overwritten before anything sees it. So buffers of as many rows stay,
        # and with them the graphs that were captured.
        if self._kept is None or self._kept.rows != batch_size:
            self._kept = None
            self._kept = self._array(batch_size)
        self._kept.positions = self._positions_for(0, self._shape.cache_len)
        self._bind_kept()

    @property
    def address(self) -> int:
        """Where the cache begins; another one after every `reorder`, as a rule."""
        return 0 if self._kept is None else self._kept.buffer.address

    @property
    def positions(self) -> int:
        return 0 if self._kept is None else self._kept.positions

    def before_step(self, seq: int, write_positions: NDArray[np.int64], stream: Any) -> None:
        used = int(write_positions.max()) + seq
        positions = self._positions_for(used, self._shape.cache_len)
        if positions > self._kept.positions:
            self._kept.lengthen(positions, stream)
            self._bind_kept()

    def reorder(self, rows: NDArray[np.int64], stream: Any) -> None:
        old, new = self._kept, self._array(len(rows))
        new.positions = old.positions
        for target, source in enumerate(rows):
            new.copy_row(target, old, int(source), stream)
        self._kept = new
        self._bind_kept()

    def _array(self, rows: int) -> _Array:
        """With room for all positions."""
        return _Array(self._shape, self._head_bytes, rows, self._shape.cache_len)

    def _bind_kept(self) -> None:
        self._kept.bind(cache_names("past", self._shape.num_layers), self._bind)


class InPlaceDeviceCache(_Buffers):
    """Each buffer is input and output at once."""

    def after_step(self, write_positions: NDArray[np.int64], stream: Any) -> None:
        pass

    def _bind_kept(self) -> None:
        super()._bind_kept()
        self._kept.bind(cache_names("present", self._shape.num_layers), self._bind)


class CopiedDeviceCache(_Buffers):
    """One byte an element; what a step computes is copied into the cache afterwards.

    Keys and values of all layers are one array, so rows that write at one position take one copy,
    and others one each.
    """

    def __init__(self, shape: CacheShape, positions_for: PositionsFor, bind: BindBuffer):
        super().__init__(shape, 1, positions_for, bind)
        # By (rows, seq): a captured step writes where it wrote when it was captured.
        self._new: dict[tuple[int, int], _Array] = {}
        self._seq = 0

    def before_step(self, seq: int, write_positions: NDArray[np.int64], stream: Any) -> None:
        super().before_step(seq, write_positions, stream)
        key = (self._kept.rows, seq)
        if key not in self._new:
            # One that is not for single tokens is used once, mostly: the pieces of a prompt.
            self._new = {k: array for k, array in self._new.items() if k[1] == 1}
            self._new[key] = _Array(self._shape, self._head_bytes, *key)
        self._new[key].bind(cache_names("new", self._shape.num_layers), self._bind)
        self._seq = seq

    def after_step(self, write_positions: NDArray[np.int64], stream: Any) -> None:
        kept, new = self._kept, self._new[self._kept.rows, self._seq]
        width = self._seq * self._head_bytes
        if len(set(write_positions.tolist())) == 1:
            extent = (kept.parts, kept.heads, width)
            copy_block(new.block(0, 0), kept.block(0, int(write_positions[0])), extent, stream)
            return
        for row, position in enumerate(write_positions.tolist()):
            extent = (kept.parts, self._shape.num_kv_heads, width)
            copy_block(new.block(row, 0), kept.block(row, position), extent, stream)


def make_device_cache(
    shape: CacheShape,
    cache_type: KvCacheType,
    element_bytes: int,
    positions_for: PositionsFor,
    bind: BindBuffer,
) -> DeviceCache:
    """element_bytes: of the network's own type."""
    if cache_type == "auto":
        return InPlaceDeviceCache(shape, element_bytes, positions_for, bind)
    return CopiedDeviceCache(shape, positions_for, bind)
