"""Streams the tensors of a checkpoint, in small slabs, into the `.bin` files of an FT directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from mpt_trt.config import MptConfig
from mpt_trt.errors import MptTrtError
from mpt_trt.files import ContentHash, reserve, write_in_pieces
from mpt_trt.ft_layout import FtFile, held
from mpt_trt.hf_checkpoint import HfCheckpoint, not_finite
from mpt_trt.numerics import STORAGE_TYPES, convert, is_finite, transposition
from mpt_trt.sharding import Range, Shard
from mpt_trt.weight_map import Weight

# What a worker takes of each row of a matrix at a time, at least: few enough bytes for the gathered
# block to stay in the processor's cache while it is transposed, checked, hashed and written.
SLAB_ROW_BYTES = 256
# Of few rows it takes more, until the block is worth the calls that handle it.
SLAB_BLOCK_BYTES = 512 << 10
# What it takes of a tensor that is not transposed.
SLAB_BYTES = 4 << 20
# Bytes after which progress is reported.
REPORTED_BYTES = 16 << 20

Advance = Callable[[int], None]


@dataclass(frozen=True)
class TensorSource:
    """The tensors of a checkpoint in the type and the order in which FT files hold them.

    storage_type: a key of STORAGE_TYPES. All methods raise MptTrtError for a NaN or Inf in the
    checkpoint, and for a value that the storage type cannot hold. What they yield may be a buffer
    that the next piece overwrites.
    """

    checkpoint: HfCheckpoint
    config: MptConfig
    storage_type: str

    def describe(self, weight: Weight) -> str:
        """For messages."""
        return weight.name if weight.hf_name is None else self.checkpoint.describe(weight)

    def prefetch(self, weight: Weight) -> None:
        """Says that all of a tensor will be read."""
        if weight.hf_name is not None:
            self.checkpoint.prefetch(weight)

    def values(self, file: FtFile) -> Iterator[NDArray]:
        """Pieces of what a tensor's own file holds, flat."""
        weight = file.weight
        if weight.hf_name is None:
            yield np.zeros(weight.shape, STORAGE_TYPES[self.storage_type])
            return
        source = self.checkpoint.tensor(weight)
        for slab in self._slabs(weight, file.shard, source):
            if not is_finite(slab):
                raise not_finite(source, self.describe(weight))
            yield stored(slab, self.storage_type, self.describe(weight))

    def rows(self, file: FtFile) -> Iterator[tuple[Range, NDArray]]:
        """Blocks of rows of a linear layer's weight, `[some of in, out]`, and which rows they are.

        Rows are counted in the whole matrix, of which the file may hold a rank's part.
        """
        assert file.shard is not None
        _, columns = held(self.config, file.weight, file.shard)
        start = columns.start
        for slab in self.values(file):
            block = slab.reshape(-1, file.shape[1])
            yield Range(start, start + len(block)), block
            start += len(block)

    def _slabs(self, weight: Weight, shard: Shard | None, source: NDArray) -> Iterator[NDArray]:
        """Pieces of a file's content in order, flat, in the checkpoint's type."""
        if shard is None:
            yield from _flat_slabs(source)
            return
        rows, columns = held(self.config, weight, shard)
        parts = [source[r.start : r.stop] for r in rows]
        if weight.is_linear:
            yield from _transposed_slabs(parts, columns)
        else:
            yield np.concatenate(parts)


def stored(values: NDArray, storage_type: str, description: str) -> NDArray:
    """`values`, which are finite, in the storage type; raises MptTrtError where it overflows."""
    converted = convert(values, STORAGE_TYPES[storage_type])
    if converted.dtype != values.dtype and not is_finite(converted):
        largest = np.abs(values.astype(np.float64)).max()
        raise MptTrtError(
            f"{description} holds {largest:g}, which {storage_type} cannot hold; "
            "choose storage type bfloat16 or float32"
        )
    return converted


class FtOutput:
    """One `.bin` file that is being written; use it as a context manager."""

    def __init__(self, folder: Path, file: FtFile, advance: Advance):
        self.name = file.name
        self._digest = ContentHash()
        self._advance = advance
        self._unreported = 0
        self._stream: BinaryIO = (folder / file.name).open("wb")
        reserve(self._stream, file.byte_size)

    def __enter__(self) -> FtOutput:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()
        self._report()

    def write(self, values: NDArray) -> None:
        """Appends values, contiguous, in the file's type."""
        content = values.view(np.uint8)
        write_in_pieces(self._stream, content)
        self._digest.update(content)
        self._unreported += content.nbytes
        if self._unreported >= REPORTED_BYTES:
            self._report()

    def _report(self) -> None:
        self._advance(self._unreported)
        self._unreported = 0

    @property
    def hash(self) -> str:
        """ContentHash of what has been written."""
        return str(self._digest)


@dataclass(frozen=True)
class FtWriter:
    """Writes files of one directory. advance: called with the number of bytes written."""

    folder: Path
    advance: Advance

    def open(self, file: FtFile) -> FtOutput:
        return FtOutput(self.folder, file, self.advance)

    def write(self, file: FtFile, pieces: Iterable[NDArray]) -> dict[str, str]:
        """Writes a whole file; returns its content hash by its name."""
        with self.open(file) as output:
            for piece in pieces:
                output.write(piece)
        return {output.name: output.hash}


def _flat_slabs(source: NDArray) -> Iterator[NDArray]:
    flat = np.ascontiguousarray(source).reshape(-1)
    step = SLAB_BYTES // source.itemsize
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def _transposed_slabs(parts: list[NDArray], columns: Range) -> Iterator[NDArray]:
    """Row blocks of `[len(columns), sum of part rows]`, flat."""
    width = sum(len(part) for part in parts)
    row_bytes = SLAB_ROW_BYTES * max(1, SLAB_BLOCK_BYTES // (SLAB_ROW_BYTES * width))
    height = min(len(columns), row_bytes // parts[0].itemsize)
    rest = columns.stop - len(columns) % height
    yield from _equal_slabs(parts, Range(columns.start, rest), height)
    yield from _equal_slabs(parts, Range(rest, columns.stop), columns.stop - rest)


def _equal_slabs(parts: list[NDArray], columns: Range, height: int) -> Iterator[NDArray]:
    """Row blocks of `height` rows, flat, through reused buffers."""
    if len(columns) == 0:
        return
    width = sum(len(part) for part in parts)
    # Only a contiguous block is transposed fast; so its columns are gathered first.
    gathered = np.empty((width, height), parts[0].dtype)
    transposed = np.empty((height, width), parts[0].dtype)
    transpose = transposition(gathered, transposed)
    for start in range(columns.start, columns.stop, height):
        np.concatenate([part[:, start : start + height] for part in parts], out=gathered)
        transpose()
        yield transposed.reshape(-1)
