"""Reads the arrays of an npz archive one by one, or a few rows at a time, without unpacking it."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mpt_trt.arrays.cast import EXPONENTS, convert, is_finite
from mpt_trt.calibration.npz_keys import FILE_NAME
from mpt_trt.errors import MptTrtError

# Of zip, up to the name; it ends with the lengths of name and extra field.
LOCAL_HEADER_BYTES = 30


class NpzFile:
    """An npz archive whose arrays are read when they are asked for.

    Raises MptTrtError, naming the file, when there is none or it is no such archive.
    """

    def __init__(self, path: Path):
        self.path = path
        self._of_thread = threading.local()
        self._parsing = threading.Lock()
        try:
            names = self._archive().namelist()
        except FileNotFoundError:
            raise MptTrtError(f"{path}: no such file; quantize.py makes {FILE_NAME}") from None
        except (zipfile.BadZipFile, OSError) as error:
            raise self.refused(f"cannot be read as an npz archive ({error})") from None
        self.keys = frozenset(name.removesuffix(".npy") for name in names)

    def _archive(self) -> zipfile.ZipFile:
        """One a thread: Python 3.12 opens an entry at a wrong place while another one is read."""
        if not hasattr(self._of_thread, "archive"):
            self._of_thread.archive = zipfile.ZipFile(self.path)
        return self._of_thread.archive

    def array(self, key: str) -> NDArray:
        """Raises MptTrtError when there is no such array, or it is damaged."""
        with self._stream(key) as stream:
            shape, is_by_column, dtype = self._header(stream)
            order = "F" if is_by_column else "C"
            return np.frombuffer(stream.read(), dtype).reshape(shape, order=order)

    def floats(self, key: str) -> NDArray[np.float32]:
        """The array in float32; raises MptTrtError also when it holds NaN or Inf."""
        return convert(self.numbers(key), np.dtype(np.float32))

    def numbers(self, key: str) -> NDArray:
        """The array as it is stored; raises MptTrtError also when it holds NaN or Inf."""
        found = self.array(key)
        if found.dtype not in EXPONENTS:
            found = found.astype(np.float32)
        if not is_finite(found):
            raise self.refused(f"{key} holds NaN or Inf")
        return found

    def rows(self, key: str, number: int) -> Iterator[NDArray]:
        """`numbers` of a matrix, so many rows at a time; what is damaged shows at the end.

        Rows are valid until the next ones are asked for.
        """
        with self._stream(key) as stream:
            shape, is_by_column, dtype = self._header(stream)
            header_bytes = stream.tell()
            entry = self._archive().getinfo(f"{key}.npy")
            is_stored = entry.compress_type == zipfile.ZIP_STORED
            if is_stored and not is_by_column and dtype in EXPONENTS:
                buffer = np.empty((max(1, min(number, shape[0])), *shape[1:]), dtype)
                yield from self._rows(key, entry, header_bytes, shape[0], buffer)
                return
        whole = self.numbers(key)
        for start in range(0, len(whole), number):
            yield whole[start : start + number]

    def _rows(
        self, key: str, entry: zipfile.ZipInfo, header_bytes: int, height: int, buffer: NDArray
    ) -> Iterator[NDArray]:
        """Rows of an entry that is not compressed, read into `buffer`.

        Not by way of zipfile, which makes each time an object of their size.
        """
        descriptor = self._archive().fp.fileno()
        place = _content_offset(descriptor, entry)
        check = zlib.crc32(os.pread(descriptor, header_bytes, place))
        place += header_bytes
        for start in range(0, height, len(buffer)):
            found = buffer[: height - start]
            if os.preadv(descriptor, [memoryview(found).cast("B")], place) != found.nbytes:
                raise self.refused(f"{key} is damaged (it ends in row {start} or later)")
            check = zlib.crc32(found, check)
            place += found.nbytes
            if not is_finite(found):
                raise self.refused(f"{key} holds NaN or Inf")
            yield found
        if check != entry.CRC:
            raise self.refused(f"{key} is damaged (its check sum is another)")

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape alone, without reading the data."""
        with self._stream(key) as stream:
            return self._header(stream)[0]

    def _header(self, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        """Shape, whether columns lie one after the other, and type.

        By one thread at a time: NumPy has Python parse it, which in CPython 3.11 fails now and then
        where two threads do that ("AST constructor recursion depth mismatch", gh-106905).
        """
        with self._parsing:
            old = npy.read_magic(stream) == (1, 0)
            read = npy.read_array_header_1_0 if old else npy.read_array_header_2_0
            return read(stream)

    def refused(self, what: str) -> MptTrtError:
        return MptTrtError(f"{self.path}: {what}; calibrate the model again with quantize.py")

    @contextlib.contextmanager
    def _stream(self, key: str) -> Iterator[zipfile.ZipExtFile]:
        if key not in self.keys:
            raise self.refused(f"{key} is missing")
        try:
            with self._archive().open(f"{key}.npy") as stream:
                yield stream
        except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
            raise self.refused(f"{key} is damaged ({error})") from None


def _content_offset(descriptor: int, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind its local header, a name and an extra field."""
    lengths = os.pread(descriptor, 4, entry.header_offset + LOCAL_HEADER_BYTES - 4)
    return entry.header_offset + LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", lengths))
