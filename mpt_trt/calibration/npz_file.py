"""Reads the arrays of an npz archive one by one, or a few rows at a time, without unpacking it."""

from __future__ import annotations

import contextlib
import io
import lzma
import math
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
from mpt_trt.errors import MptTrtError
from mpt_trt.system.json_text import shown

# Size of zip's local header up to the name; it ends with the lengths of name and extra field.
LOCAL_HEADER_BYTES = 30
ZIP_MAGIC = b"PK"
NUMBER_KINDS, TEXT_KINDS = "fiub", "U"
# A character of NumPy's takes four bytes.
MOST_TEXT_BYTES = 4 * 1000
# NumPy accepts headers of up to 10,000 characters, but would first read up to 4 GB.
NPY_MAGIC_BYTES, NPY_HEADER_BYTES = 12, 1 << 14
MOST_REASON = 200
CALIBRATE_AGAIN = "calibrate the model again with quantize.py"
# Python's errors for damaged, too new, unknown-compression and encrypted archives.
ARCHIVE_ERRORS = (
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class NpzFile:
    """An npz archive whose arrays are read on request.

    remedy: for error messages.

    Raises MptTrtError, naming the file, when it does not exist or is not an npz archive.
    """

    def __init__(self, path: Path, remedy: str = CALIBRATE_AGAIN):
        self.path = path
        self._remedy = remedy
        self._of_thread = threading.local()
        self._parsing = threading.Lock()
        if path.exists() and not path.is_file() and not path.is_dir():
            # Reading a pipe would wait, and reading a device might never end.
            raise self.refused("a pipe or device, not an npz file")
        try:
            names = self._archive().namelist()
        except FileNotFoundError:
            raise MptTrtError(f"{path}: no such file; {remedy}") from None
        except OSError as error:
            raise MptTrtError(f"{path}: {error.strerror or error}; name an npz file") from None
        except ARCHIVE_ERRORS as error:
            what = f"cannot be read as an npz archive ({_reason(error)})"
            raise (self.damaged(what) if _begins_as_archive(path) else self.refused(what)) from None
        if len(set(names)) < len(names):
            raise self.damaged("holds two arrays of the same name")
        self.keys = frozenset(name.removesuffix(".npy") for name in names)

    def _archive(self) -> zipfile.ZipFile:
        """Returns the calling thread's own archive.

        Python 3.12 opens entries at a wrong offset while another thread reads the same archive.
        """
        archive: zipfile.ZipFile | None = getattr(self._of_thread, "archive", None)
        if archive is None:
            archive = self._of_thread.archive = zipfile.ZipFile(self.path)
        return archive

    def array(self, key: str, most: int | None = None) -> NDArray:
        """Reads a whole array.

        most: maximum number of values, unless it is known otherwise.

        Raises MptTrtError when it is missing or damaged, has more values, or is not numeric.
        """
        with self._stream(key) as stream:
            shape, is_by_column, dtype = self._header(key, stream)
            if most is not None and math.prod(shape) > most:
                raise self.damaged(f"{key} holds {math.prod(shape)} values, more than {most}")
            flat = np.frombuffer(stream.read(), dtype)
            return flat.reshape(shape, order="F" if is_by_column else "C")

    def floats(self, key: str) -> NDArray[np.float32]:
        """Reads an array in float32; also raises MptTrtError when it contains NaN or Inf.

        Its shape must have been checked; `shape` reads only the shape.
        """
        return convert(self.numbers(key), np.dtype(np.float32))

    def numbers(self, key: str) -> NDArray:
        """Reads an array as stored; also raises MptTrtError when it contains NaN or Inf."""
        numbers = self.array(key)
        if numbers.dtype not in EXPONENTS:
            numbers = numbers.astype(np.float32)
        if not is_finite(numbers):
            raise self.damaged(f"{key} holds NaN or Inf")
        return numbers

    def rows(self, key: str, number: int) -> Iterator[NDArray]:
        """Yields `numbers` of a matrix, up to `number` rows at a time, `[rows, columns]`.

        Rows are valid until the next ones are requested. Some damage is detected only at the end.
        """
        with self._stream(key) as stream:
            shape, is_by_column, dtype = self._header(key, stream)
            header_bytes = stream.tell()
            if len(shape) != 2:
                raise self.damaged(f"{key} has shape {list(shape)}, but must be a matrix")
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
        """Yields rows of an uncompressed entry, read into `buffer`.

        Bypasses zipfile, which would allocate memory for each piece.
        """
        stream = self._archive().fp
        assert stream is not None
        descriptor = stream.fileno()
        place = _content_offset(descriptor, entry)
        check = zlib.crc32(os.pread(descriptor, header_bytes, place))
        place += header_bytes
        for start in range(0, height, len(buffer)):
            rows = buffer[: height - start]
            content = memoryview(rows.data).cast("B")
            if os.preadv(descriptor, [content], place) != rows.nbytes:
                raise self.damaged(f"{key} is damaged (it ends in row {start} or later)")
            check = zlib.crc32(content, check)
            place += rows.nbytes
            if not is_finite(rows):
                raise self.damaged(f"{key} holds NaN or Inf")
            yield rows
        if check != entry.CRC:
            raise self.damaged(f"{key} is damaged (its checksum differs)")

    def text(self, key: str) -> str:
        """Reads a text of up to 1,000 characters."""
        with self._stream(key) as stream:
            shape, _, dtype = self._header(key, stream, TEXT_KINDS)
            if shape != () or not 0 < dtype.itemsize <= MOST_TEXT_BYTES:
                raise self.damaged(f"{key} has shape {list(shape)} of {dtype}: a text is expected")
            try:
                return str(np.frombuffer(stream.read(), dtype)[0])
            except ValueError as error:
                raise self.damaged(f"{key} is damaged ({_reason(error)})") from None

    def shape(self, key: str) -> tuple[int, ...]:
        """Reads the shape of an array."""
        with self._stream(key) as stream:
            return self._header(key, stream)[0]

    def _header(
        self, key: str, stream: IO[bytes], kinds: str = NUMBER_KINDS
    ) -> tuple[tuple[int, ...], bool, np.dtype]:
        """Reads shape, whether columns are contiguous, and type; leaves `stream` at the data.

        Raises MptTrtError unless the array has the size of its entry.
        """
        start = stream.read(NPY_MAGIC_BYTES)
        # Version 1 of the format has a length of two bytes, later ones of four.
        length = 2 if start[6:7] == b"\x01" else 4
        end = 8 + length + int.from_bytes(start[8 : 8 + length], "little")
        if not NPY_MAGIC_BYTES <= end <= NPY_HEADER_BYTES:
            raise self.damaged(f"{key} is damaged (its header has {end} bytes)")
        start += stream.read(end - len(start))
        try:
            shape, is_by_column, dtype = self._parse(io.BytesIO(start))
        except Exception as error:  # NumPy evaluates the header as Python
            raise self.damaged(f"{key} is damaged (its header: {shown(error)})") from None
        if dtype.kind not in kinds and (dtype not in EXPONENTS or kinds != NUMBER_KINDS):
            expected = "numbers" if kinds == NUMBER_KINDS else "text"
            raise self.damaged(f"{key} holds {dtype} instead of {expected}")
        size = self._archive().getinfo(f"{key}.npy").file_size - end
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
            raise self.damaged(
                f"{key} is damaged ({shown(list(shape))} of {dtype} are not its {size} bytes)"
            )
        return shape, is_by_column, dtype

    def _parse(self, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        """Parses a header of NumPy's format.

        One thread at a time: NumPy lets Python parse the header, which occasionally fails in
        CPython 3.11 when two threads do so ("AST constructor recursion depth mismatch", gh-106905).
        """
        with self._parsing:
            old = npy.read_magic(stream) == (1, 0)
            read = npy.read_array_header_1_0 if old else npy.read_array_header_2_0
            shape, is_by_column, dtype = read(stream)
            return shape, is_by_column, dtype

    def refused(self, what: str) -> MptTrtError:
        """Makes the error that names the file, `what` is wrong, and the remedy."""
        return MptTrtError(f"{self.path}: {what}; {self._remedy}")

    def damaged(self, what: str) -> MptTrtError:
        """Makes the error for an incomplete file."""
        return MptTrtError(f"{self.path}: {what}; delete it and {self._remedy}")

    @contextlib.contextmanager
    def _stream(self, key: str) -> Iterator[IO[bytes]]:
        if key not in self.keys:
            raise self.damaged(f"{key} is missing")
        try:
            with self._archive().open(f"{key}.npy") as stream:
                yield stream
        except MptTrtError:
            raise
        except ARCHIVE_ERRORS as error:
            raise self.damaged(f"{key} is damaged ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """The text of an error of zipfile's, which may quote much of the file."""
    text = str(error)
    return text if len(text) <= MOST_REASON else f"{text[:MOST_REASON]}..."


def _begins_as_archive(path: Path) -> bool:
    """Returns whether a file is a damaged archive, not one of another kind."""
    with path.open("rb") as stream:
        return stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def _content_offset(descriptor: int, entry: zipfile.ZipInfo) -> int:
    """Offset of an entry's content, after its local header, name and extra field."""
    lengths = os.pread(descriptor, 4, entry.header_offset + LOCAL_HEADER_BYTES - 4)
    return entry.header_offset + LOCAL_HEADER_BYTES + sum(struct.unpack("<HH", lengths))
