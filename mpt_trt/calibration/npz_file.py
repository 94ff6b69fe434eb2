"""Calibration results in the layout of AMMO's npz: written as a stream, read lazily.

Keys are `_np:` and the path of a tensor in AMMO's model, joined by `:`; docs/quantization.md lists
them. Q, K and V are apart there and one matrix, rows Q | K | V, here. What AMMO has no place for is
under `mpt_trt:`, where its readers do not look: the ranges of keys and values, and a small part of
every matrix of the model that was calibrated, by which a result is known to belong to it.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mpt_trt.arrays.cast import EXPONENTS, convert, is_finite
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.joined_tensors import FtTensors
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import Weight, WeightReader, block_matrices, weights
from mpt_trt.quantization.calibrated_weights import (
    AwqMatrix,
    CalibratedMatrix,
    Fp8Scales,
    KvRanges,
    SmoothQuantMatrix,
)
from mpt_trt.quantization.schemes import QuantizationFormat
from mpt_trt.system.files import WRITE_BYTES, replace_file, write_in_pieces

FILE_NAME = "mpt_tp1_rank0.npz"

QKV = "attention.query_key_value"
MATRIX_KEYS = {
    QKV: ("attention:qkv:q", "attention:qkv:k", "attention:qkv:v"),
    "attention.dense": ("attention:dense",),
    "mlp.dense_h_to_4h": ("mlp:fc",),
    "mlp.dense_4h_to_h": ("mlp:proj",),
}
NORM_KEYS = {
    "input_layernorm.weight": "input_layernorm:weight",
    "post_attention_layernorm.weight": "post_layernorm:weight",
}

WEIGHT, SMOOTHING = "weight", "prequant_scaling_factor"
WEIGHT_SCALE, ACTIVATION_SCALE = "weights_scaling_factor", "activation_scaling_factor"

# Formats whose results have whole matrices in them.
WITH_MATRICES: tuple[QuantizationFormat, ...] = ("int4_awq", "int8_sq")

# Models are told apart by so many rows and columns of each matrix, and by their norms ...
CORNER = (8, 64)
# ... which may have been rounded to bfloat16 on both sides.
RELATIVE_TOLERANCE = 2.0**-7
# The smallest step of float16.
ABSOLUTE_TOLERANCE = 2.0**-24

# The earliest time that a zip archive can name.
TIME_STAMP = (1980, 1, 1, 0, 0, 0)
# Of zip, up to the name; it ends with the lengths of name and extra field.
LOCAL_HEADER_BYTES = 30


# --- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationWriter:
    """An archive that grows by one array at a time; the same arrays make the same bytes.

    weight_dtype: float16 or float32, of weights; everything else is float32.
    """

    archive: zipfile.ZipFile
    config: MptConfig
    reader: WeightReader
    weight_dtype: np.dtype

    def model(self, quantization_format: QuantizationFormat) -> None:
        """What the model is known by: all norms, and a part of each matrix.

        And the embedding, where there are matrices: then AMMO's loader takes all weights from here.
        """
        for weight in weights(self.config):
            if len(weight.shape) == 2:
                self._fingerprint(weight)
            is_wanted = weight.name != "wte" or quantization_format in WITH_MATRICES
            if is_wanted and (key := _whole_key(weight)) is not None:
                self._weight(key, self.reader.tensor(weight), weight.name)

    def block(self, layer: int, ranges: KvRanges, matrices: Mapping[str, CalibratedMatrix]) -> None:
        """matrices: by FT name within the layer, e.g. `attention.dense`."""
        self.kv_ranges(layer, ranges)
        for name, found in matrices.items():
            self.matrix(layer, name, found)

    def kv_ranges(self, layer: int, ranges: KvRanges) -> None:
        self._scalar(_range_key(layer, "key"), ranges.key)
        self._scalar(_range_key(layer, "value"), ranges.value)

    def matrix(self, layer: int, matrix: str, found: CalibratedMatrix) -> None:
        """matrix: FT name within the layer, e.g. `attention.dense`."""
        keys = _matrix_keys(layer, matrix)
        if isinstance(found, Fp8Scales):
            for key in keys:
                self._scalar(f"{key}:{WEIGHT_SCALE}", found.weight)
                self._scalar(f"{key}:{ACTIVATION_SCALE}", found.activation)
            return
        heights = _heights(self.config, matrix, len(found.weight))
        cuts = np.cumsum(heights)[:-1]
        parts = zip(keys, np.split(found.weight, cuts), np.split(found.scales, cuts), strict=True)
        for key, weight, scales in parts:
            self._weight(f"{key}:{WEIGHT}", weight, key)
            self._write(f"{key}:{WEIGHT_SCALE}", scales)
            self._write(f"{key}:{SMOOTHING}", found.pre_quant_scale)
            if isinstance(found, SmoothQuantMatrix):
                self._scalar(f"{key}:{ACTIVATION_SCALE}", found.activation_scale)

    def _fingerprint(self, weight: Weight) -> None:
        rows, columns = CORNER
        corner = self.reader.tensor(weight)[:rows, :columns].astype(np.float32)
        self._write(_corner_key(weight), corner)
        self._write(_shape_key(weight), np.array(weight.shape, np.int64))

    def _weight(self, key: str, values: NDArray, name: str) -> None:
        """Writes `values` in weight_dtype; raises MptTrtError for what is not finite there."""
        with self._entry(key, self.weight_dtype, values.shape) as stream:
            for piece in _pieces(values):
                stored = convert(piece, self.weight_dtype)
                if not is_finite(stored):
                    raise MptTrtError(
                        f"{name} holds NaN, Inf or values that {self.weight_dtype} cannot hold; "
                        "calibrate with --dtype float32, or check the checkpoint"
                    )
                stream.write(memoryview(stored).cast("B"))

    def _scalar(self, key: str, value: float) -> None:
        self._write(key, np.array([value], np.float32))

    def _write(self, key: str, values: NDArray) -> None:
        with self._entry(key, values.dtype, values.shape) as stream:
            write_in_pieces(stream, np.ascontiguousarray(values))

    @contextlib.contextmanager
    def _entry(self, key: str, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
        """An array of the archive whose elements, in C order, are written to the stream."""
        entry = zipfile.ZipInfo(f"{key}.npy", TIME_STAMP)
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with self.archive.open(entry, "w", force_zip64=True) as stream:
            npy.write_array_header_1_0(stream, header)
            yield stream


@contextlib.contextmanager
def calibration_writer(
    target: Path, config: MptConfig, reader: WeightReader, weight_dtype: np.dtype
) -> Iterator[CalibrationWriter]:
    """Writes `target` as a whole, or not at all. reader: of the model that is calibrated."""
    with replace_file(target) as partial, zipfile.ZipFile(partial, "w") as archive:
        yield CalibrationWriter(archive, config, reader, weight_dtype)


def _pieces(values: NDArray) -> Iterator[NDArray]:
    """The elements in C order, in flat parts that fit into the processor's cache."""
    flat, step = values.reshape(-1), WRITE_BYTES // values.itemsize
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


# --- reading -------------------------------------------------------------------------------------


def read_calibration(path: Path, checkpoint: FtCheckpoint) -> CalibrationResult:
    """Opens a calibration result, of ours or of AMMO, for a model.

    Raises MptTrtError, with what differs and the remedy, when the file is damaged or was made for
    another model: another architecture, or other weights.
    """
    file = NpzFile(path)
    result = CalibrationResult(file, checkpoint.config)
    _require_layers(file, checkpoint.config)
    _require_same_weights(file, checkpoint)
    if result.quantization_format in WITH_MATRICES:
        for layer in range(checkpoint.config.num_layers):
            for matrix, weight in block_matrices(checkpoint.config, layer).items():
                _require_shapes(result, layer, matrix, weight)
    return result


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

    def other_model(self, what: str, found: object, expected: object) -> MptTrtError:
        return self.refused(
            f"made for another model: {what} is {found} there, but {expected} in the checkpoint"
        )

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


@dataclass(frozen=True)
class CalibrationResult:
    """What calibration found, by layer and by FT name of a matrix, e.g. `attention.dense`."""

    file: NpzFile
    config: MptConfig

    @property
    def path(self) -> Path:
        return self.file.path

    @cached_property
    def quantization_format(self) -> QuantizationFormat:
        """What the keys say: AMMO's files have no other word for it."""
        base = _matrix_keys(0, "attention.dense")[0]
        is_quantized = f"{base}:{ACTIVATION_SCALE}" in self.file.keys
        if f"{base}:{SMOOTHING}" in self.file.keys:
            return "int8_sq" if is_quantized else "int4_awq"
        return "fp8" if is_quantized else "kv_cache"

    @cached_property
    def group_size(self) -> int | None:
        """Input features that share a scale; None unless the format is int4_awq."""
        if self.quantization_format != "int4_awq":
            return None
        base = _matrix_keys(0, "attention.dense")[0]
        elements = math.prod(self.file.shape(f"{base}:{WEIGHT}"))
        scales = math.prod(self.file.shape(f"{base}:{WEIGHT_SCALE}"))
        if not scales or elements % scales:
            raise self.file.refused(f"{base} has {scales} scales for {elements} weights")
        return elements // scales

    def awq_matrix(self, layer: int, matrix: str) -> AwqMatrix:
        self._require_format("int4_awq")
        weight, scales = self._weight(layer, matrix), self.awq_scales(layer, matrix)
        return AwqMatrix(weight, scales, self._smoothing(layer, matrix))

    def awq_rows(self, layer: int, matrix: str, number: int) -> Iterator[NDArray]:
        """The weight of `awq_matrix`, at most so many rows at a time."""
        self._require_format("int4_awq")
        for key in _matrix_keys(layer, matrix):
            yield from self.file.rows(f"{key}:{WEIGHT}", number)

    def awq_scales(self, layer: int, matrix: str) -> NDArray[np.float32]:
        """`[out, in / group_size]`, without reading the matrix."""
        self._require_format("int4_awq")
        out_features, _ = block_matrices(self.config, layer)[matrix].shape
        return self._joined(layer, matrix, WEIGHT_SCALE).reshape(out_features, -1)

    def pre_quant_scale(self, layer: int, matrix: str) -> NDArray[np.float32]:
        """What the input of a matrix is multiplied by, `[in]`, without reading the matrix."""
        return self._smoothing(layer, matrix)

    def smoothquant_matrix(self, layer: int, matrix: str) -> SmoothQuantMatrix:
        self._require_format("int8_sq")
        return SmoothQuantMatrix(
            self._weight(layer, matrix),
            *self.smoothquant_scales(layer, matrix),
        )

    def smoothquant_scales(
        self, layer: int, matrix: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
        """Scales, pre-quant scale and activation scale, without reading the matrix."""
        self._require_format("int8_sq")
        return (
            self._joined(layer, matrix, WEIGHT_SCALE),
            self._smoothing(layer, matrix),
            self._largest(layer, matrix, ACTIVATION_SCALE),
        )

    def fp8_scales(self, layer: int, matrix: str) -> Fp8Scales:
        """Of QKV, the largest of the scales of Q, K and V."""
        self._require_format("fp8")
        return Fp8Scales(
            self._largest(layer, matrix, WEIGHT_SCALE),
            self._largest(layer, matrix, ACTIVATION_SCALE),
        )

    def kv_ranges(self, layer: int) -> KvRanges:
        """Raises MptTrtError for a file that AMMO made: it has none."""
        if _range_key(layer, "key") not in self.file.keys:
            raise self.file.refused(
                "holds no ranges of keys and values, as files made by AMMO; an 8-bit KV cache "
                "needs them"
            )
        return KvRanges(*(self._scalar(_range_key(layer, name)) for name in ("key", "value")))

    def _require_format(self, asked: QuantizationFormat) -> None:
        if self.quantization_format != asked:
            raise MptTrtError(
                f"{self.file.path}: holds the result of {self.quantization_format}, but {asked} is "
                f"needed; calibrate with --qformat {asked}"
            )

    def _weight(self, layer: int, matrix: str) -> NDArray:
        """Q, K and V one below the other, in the type in which they are stored."""
        keys = _matrix_keys(layer, matrix)
        parts = [self.file.numbers(f"{key}:{WEIGHT}") for key in keys]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _joined(self, layer: int, matrix: str, name: str) -> NDArray[np.float32]:
        """Scales of Q, K and V one after the other, flat."""
        parts = [self.file.floats(f"{key}:{name}") for key in _matrix_keys(layer, matrix)]
        return np.concatenate([part.reshape(-1) for part in parts])

    def _smoothing(self, layer: int, matrix: str) -> NDArray[np.float32]:
        keys = _matrix_keys(layer, matrix)
        first, *others = (self.file.floats(f"{key}:{SMOOTHING}") for key in keys)
        for key, other in zip(keys[1:], others, strict=True):
            if not np.array_equal(first, other):
                raise self.file.refused(
                    f"{key}:{SMOOTHING} differs from that of {keys[0]}, although both multiply the "
                    "same activations"
                )
        if first.min() <= 0:
            raise self.file.refused(f"{keys[0]}:{SMOOTHING} holds {first.min()}, not positive")
        return first

    def _largest(self, layer: int, matrix: str, name: str) -> float:
        return max(self._scalar(f"{key}:{name}") for key in _matrix_keys(layer, matrix))

    def _scalar(self, key: str) -> float:
        found = self.file.floats(key)
        if found.size != 1:
            raise self.file.refused(f"{key} holds {found.size} values instead of one")
        return float(found.item())


# --- whether a file belongs to a model -----------------------------------------------------------


def _require_layers(file: NpzFile, config: MptConfig) -> None:
    norm = re.compile(r"_np:layers:[0-9]+:input_layernorm:weight")
    if not (found := sum(bool(norm.fullmatch(key)) for key in file.keys)):
        raise file.refused("holds no layers in AMMO's layout")
    if found != config.num_layers:
        raise file.other_model("the number of layers", found, config.num_layers)


def _require_same_weights(file: NpzFile, checkpoint: FtCheckpoint) -> None:
    """Compares what the file holds of the model's own weights with those of the checkpoint."""
    tensors = FtTensors(checkpoint)
    for weight in weights(checkpoint.config):
        # Smoothing has changed the blocks' weights, and neither keys nor values.
        if checkpoint.smoothing is not None and weight.name.startswith("layers."):
            continue
        if _shape_key(weight) in file.keys:
            shape, key = tuple(file.array(_shape_key(weight)).tolist()), _corner_key(weight)
        elif (key := _whole_key(weight)) in file.keys:
            shape = file.shape(key)
        else:
            continue
        if shape != weight.shape:
            raise file.other_model(f"the shape of {weight.name}", list(shape), list(weight.shape))
        found = file.floats(key)
        expected = tensors.corner(weight, found.shape).astype(np.float32)
        _require_near(file, weight.name, found[tuple(map(slice, expected.shape))], expected)


def _require_near(file: NpzFile, name: str, found: NDArray, expected: NDArray) -> None:
    is_near = np.isclose(found, expected, RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE)
    if not is_near.all():
        place = tuple(int(i) for i in np.argwhere(~is_near)[0])
        what = f"{name} at {list(place)}"
        raise file.other_model(what, f"{found[place]:g}", f"{expected[place]:g}")


def _require_shapes(result: CalibrationResult, layer: int, matrix: str, weight: Weight) -> None:
    """Of a matrix and its scales."""
    file, group_size = result.file, result.group_size
    out_features, in_features = weight.shape
    if group_size is not None and in_features % group_size:
        raise file.refused(
            f"groups of {group_size} do not divide the {in_features} input features of "
            f"{weight.name}"
        )
    scales_per_row = 1 if group_size is None else in_features // group_size
    heights = _heights(result.config, matrix, out_features)
    for key, height in zip(_matrix_keys(layer, matrix), heights, strict=True):
        for name, expected in ((WEIGHT, (height, in_features)), (SMOOTHING, (in_features,))):
            if (found := file.shape(f"{key}:{name}")) != expected:
                what = f"the shape of {key}:{name}"
                raise file.other_model(what, list(found), list(expected))
        if (found := math.prod(file.shape(f"{key}:{WEIGHT_SCALE}"))) != height * scales_per_row:
            raise file.refused(
                f"{key}:{WEIGHT_SCALE} holds {found} scales instead of {height * scales_per_row}"
            )


# --- keys ----------------------------------------------------------------------------------------


def _matrix_keys(layer: int, matrix: str) -> list[str]:
    """Of a matrix, or of Q, K and V."""
    return [f"_np:layers:{layer}:{key}" for key in MATRIX_KEYS[matrix]]


def _heights(config: MptConfig, matrix: str, out_features: int) -> list[int]:
    """Output features of a matrix, or of Q, K and V."""
    if matrix == QKV:
        return [config.hidden_size, config.kv_size, config.kv_size]
    return [out_features]


def _whole_key(weight: Weight) -> str | None:
    """Where AMMO's layout has the embedding or the weight of a norm."""
    if weight.name == "wte":
        return "_np:vocab_embedding:weight"
    if weight.name == "final_layernorm.weight":
        return "_np:final_layernorm:weight"
    match = re.fullmatch(r"layers\.([0-9]+)\.(.+)", weight.name)
    if match is None or match[2] not in NORM_KEYS:
        return None
    return f"_np:layers:{match[1]}:{NORM_KEYS[match[2]]}"


def _range_key(layer: int, name: str) -> str:
    return f"mpt_trt:layers:{layer}:attention:{name}:amax"


def _corner_key(weight: Weight) -> str:
    return f"mpt_trt:{weight.name.replace('.', ':')}:corner"


def _shape_key(weight: Weight) -> str:
    return f"mpt_trt:{weight.name.replace('.', ':')}:shape"
