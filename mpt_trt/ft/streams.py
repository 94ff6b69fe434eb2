"""Streams a checkpoint's tensors, in small blocks, into the `.bin` files of an FT directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES, conversion, convert, is_finite
from mpt_trt.arrays.transpose import Buffers, transposed_blocks
from mpt_trt.checkpoint.tensors import HfCheckpoint, not_finite
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.layout import FtFile, held
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Range
from mpt_trt.model.tensors import Weight
from mpt_trt.system.files import ContentHash, reserve, write_in_pieces
from mpt_trt.system.process_pool import Advance

# Bytes that a worker reads at a time from a tensor that is not transposed.
SLAB_BYTES = 1 << 20
# Bytes after which progress is reported.
REPORTED_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorSource:
    """Tensors of a checkpoint in the type and order of FT files.

    storage_type: a key of STORAGE_TYPES. All methods raise MptTrtError for a NaN or Inf in the
    checkpoint, and for a value that the storage type cannot hold. They may yield buffers that the
    next piece of any tensor overwrites.
    """

    checkpoint: HfCheckpoint
    config: MptConfig
    storage_type: str
    _buffers: Buffers = field(default_factory=Buffers)

    def describe(self, weight: Weight) -> str:
        """Label of a tensor for error messages."""
        return weight.name if weight.hf_name is None else self.checkpoint.describe(weight)

    def prefetch(self, weight: Weight) -> None:
        """Reads a tensor ahead, in the order of its file."""
        if weight.hf_name is not None:
            self.checkpoint.prefetch(weight)

    def pieces(self, files: list[FtFile]) -> Iterator[list[NDArray[Any]]]:
        """Yields flat pieces of a tensor's files, one piece of each file at a time.

        files: the result of `files_of`, or one element of it.
        """
        weight = files[0].weight
        if weight.hf_name is None:
            yield [np.zeros(weight.shape, self._dtype)]
            return
        source = self.checkpoint.tensor(weight)
        for slab in self._slabs(files, source):
            # Values that are not finite in the checkpoint are not finite in any other type.
            if not is_finite(slab):
                raise self._unfit(source, weight)
            yield list(slab.reshape(len(files), -1))

    def values(self, file: FtFile) -> Iterator[NDArray[Any]]:
        """Yields flat pieces of the content of one file."""
        for (piece,) in self.pieces([file]):
            yield piece

    def rows(self, file: FtFile) -> Iterator[tuple[Range, NDArray[Any]]]:
        """Yields blocks of rows of a linear layer's weight, `[rows, out]`, with their indices.

        Indices are those of the whole matrix; the file may contain only a rank's part of it.
        """
        assert file.rank is not None
        _, columns = held(self.config, file.weight, file.rank)
        start = columns.start
        for slab in self.values(file):
            block = slab.reshape(-1, file.shape[1])
            yield Range(start, start + len(block)), block
            start += len(block)

    def _slabs(self, files: list[FtFile], source: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """Yields values of all files together, which `pieces` splits by file."""
        if files[0].rank is None:
            return _flat_slabs(source, self._dtype, self._buffers)
        parts = [self._parts(file, source) for file in files]
        if files[0].weight.is_linear:
            return transposed_blocks(parts, self._dtype, self._buffers)
        joined = np.concatenate([part for of_file in parts for part in of_file])
        return iter([convert(joined, self._dtype)])

    def _parts(self, file: FtFile, source: NDArray[Any]) -> list[NDArray[Any]]:
        """Parts of a tensor in a file, from top to bottom."""
        assert file.rank is not None
        rows, columns = held(self.config, file.weight, file.rank)
        parts = [source[r.start : r.stop] for r in rows]
        if file.weight.is_linear:
            return [part[:, columns.start : columns.stop] for part in parts]
        return parts

    def _unfit(self, source: NDArray[Any], weight: Weight) -> MptTrtError:
        """Makes the error for a tensor that is not finite in the storage type."""
        rows = source if source.ndim > 1 else source[None]
        if not all(map(is_finite, rows)):
            return not_finite(source, self.describe(weight))
        largest = max(np.abs(row.astype(np.float64)).max() for row in rows)
        fitting = [
            name for name, dtype in STORAGE_TYPES.items() if is_finite(_cast(largest, dtype))
        ]
        return MptTrtError(
            f"{self.describe(weight)} holds {largest:g}, which {self.storage_type} cannot hold; "
            + (
                f"choose another --storage_type: {' or '.join(fitting)}"
                if fitting
                else "no storage type can, so the checkpoint is damaged; download it again"
            )
        )

    @property
    def _dtype(self) -> np.dtype[Any]:
        return STORAGE_TYPES[self.storage_type]


def _cast(value: float, dtype: np.dtype[Any]) -> NDArray[Any]:
    return convert(np.array([value], np.float64), dtype)


class FtOutput:
    """A `.bin` file that is being written; a context manager."""

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

    def write(self, values: NDArray[Any]) -> None:
        """Appends contiguous values of the file's type."""
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
        """ContentHash of the bytes written so far."""
        return str(self._digest)


@dataclass(frozen=True)
class FtWriter:
    """Writes files of one directory. advance: called with the number of bytes written."""

    folder: Path
    advance: Advance

    def open(self, file: FtFile) -> FtOutput:
        """Opens a new file for writing."""
        return FtOutput(self.folder, file, self.advance)

    def write(self, file: FtFile, pieces: Iterable[NDArray[Any]]) -> dict[str, str]:
        """Writes a whole file; returns its content hash by its name."""
        return self.write_all([file], ([piece] for piece in pieces))

    def write_all(
        self, files: list[FtFile], pieces: Iterable[list[NDArray[Any]]]
    ) -> dict[str, str]:
        """Writes whole files whose pieces arrive together; returns content hashes by name."""
        with ExitStack() as stack:
            outputs = [stack.enter_context(self.open(file)) for file in files]
            for together in pieces:
                for output, piece in zip(outputs, together, strict=True):
                    output.write(piece)
        return {output.name: output.hash for output in outputs}


def _flat_slabs(
    source: NDArray[Any], dtype: np.dtype[Any], buffers: Buffers
) -> Iterator[NDArray[Any]]:
    flat = np.ascontiguousarray(source).reshape(-1)
    step = SLAB_BYTES // source.itemsize
    slabs = (flat[start : start + step] for start in range(0, flat.size, step))
    return slabs if flat.dtype == dtype else _converted(slabs, dtype, buffers)


def _converted(
    slabs: Iterator[NDArray[Any]], dtype: np.dtype[Any], buffers: Buffers
) -> Iterator[NDArray[Any]]:
    """Yields the slabs in another type, through reused buffers."""
    copied = converted = np.empty(0)
    for slab in slabs:
        if len(slab) != len(copied):
            copied = buffers.take("copied", slab.shape, slab.dtype)
            converted = buffers.take("converted", slab.shape, dtype)
            convert_copied = conversion(copied, converted)
        np.copyto(copied, slab)
        convert_copied()
        yield converted
