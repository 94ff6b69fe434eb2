"""Writes a calibration result as a stream of arrays, in the layout of AMMO's npz files."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mpt_trt.arrays.cast import convert, is_finite
from mpt_trt.calibration.npz_file import ARCHIVE_ERRORS
from mpt_trt.calibration.npz_keys import (
    ACTIVATION_SCALE,
    BUDGET,
    CORNER,
    SCALES_BY_ERROR,
    SMOOTHING,
    WEIGHT,
    WEIGHT_SCALE,
    WITH_MATRICES,
    amax_key,
    bits_key,
    corner_key,
    heights_of,
    matrix_keys,
    shape_key,
    whole_key,
)
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import BlockMatrix, Weight, WeightReader, weights
from mpt_trt.quantization.calibrated_weights import (
    CalibratedMatrix,
    Fp8Scales,
    KvAmax,
    RoundedWeights,
    SmoothQuantMatrix,
)
from mpt_trt.system.files import WRITE_BYTES, write_in_pieces
from mpt_trt.system.replace import replace_file, require_writable

# The earliest time of the zip format, so that the same arrays give the same bytes.
TIME_STAMP = (1980, 1, 1, 0, 0, 0)
# The archive's comment: results of this program, and no other files, are replaced.
MARK = b"mpt-trt calibration"


@dataclass(frozen=True)
class CalibrationWriter:
    """An archive that is written one array at a time; the same arrays give the same bytes.

    reader: reader of the calibrated model. weight_dtype: type of weights, float16 or float32;
    everything else is float32.
    """

    archive: zipfile.ZipFile
    config: MptConfig
    reader: WeightReader
    weight_dtype: np.dtype

    def model(self, plan: CalibrationPlan) -> None:
        """Writes the arrays that identify the model: all norms, and a corner of each matrix.

        If the format has matrices, the embedding is also written, because AMMO's loader then reads
        all weights from the file.
        """
        if plan.bits is not None:
            self._scalar(BUDGET, plan.bits)
        if plan.scales == "error":
            self._scalar(SCALES_BY_ERROR, 1)
        for weight in weights(self.config):
            if len(weight.shape) == 2:
                self._fingerprint(weight)
            is_needed = weight.name != "wte" or plan.quantization_format in WITH_MATRICES
            if is_needed and (key := whole_key(weight)) is not None:
                self._weight(key, self.reader.tensor(weight), weight.name)

    def block(
        self, layer: int, amax: KvAmax, matrices: Mapping[BlockMatrix, CalibratedMatrix]
    ) -> None:
        """Writes the results of a block."""
        self.kv_amax(layer, amax)
        for matrix, calibrated in matrices.items():
            self.matrix(layer, matrix, calibrated)

    def kv_amax(self, layer: int, amax: KvAmax) -> None:
        """Writes the amax of a layer's keys and values."""
        self._scalar(amax_key(layer, "key"), amax.key)
        self._scalar(amax_key(layer, "value"), amax.value)

    def matrix(self, layer: int, matrix: BlockMatrix, calibrated: CalibratedMatrix) -> None:
        """Writes the result of one matrix."""
        keys = matrix_keys(layer, matrix)
        if isinstance(calibrated, Fp8Scales):
            for key in keys:
                self._scalar(f"{key}:{WEIGHT_SCALE}", calibrated.weight)
                self._scalar(f"{key}:{ACTIVATION_SCALE}", calibrated.activation)
            return
        if isinstance(calibrated, RoundedWeights):
            self._scalar(bits_key(layer, matrix), calibrated.bits)
            # AMMO's readers expect the factor; the network has no use for ones.
            smoothing = np.ones(calibrated.weight.shape[1], np.float32)
        else:
            smoothing = calibrated.pre_quant_scale
        cuts = np.cumsum(heights_of(self.config, matrix, len(calibrated.weight)))[:-1]
        weights_by_key = np.split(calibrated.weight, cuts)
        scales_by_key = np.split(calibrated.scales, cuts)
        for key, weight, scales in zip(keys, weights_by_key, scales_by_key, strict=True):
            self._weight(f"{key}:{WEIGHT}", weight, key)
            self._write(f"{key}:{WEIGHT_SCALE}", scales)
            self._write(f"{key}:{SMOOTHING}", smoothing)
            if isinstance(calibrated, SmoothQuantMatrix):
                self._scalar(f"{key}:{ACTIVATION_SCALE}", calibrated.activation_scale)

    def _fingerprint(self, weight: Weight) -> None:
        rows, columns = CORNER
        corner = self.reader.tensor(weight)[:rows, :columns].astype(np.float32)
        self._write(corner_key(weight), corner)
        self._write(shape_key(weight), np.array(weight.shape, np.int64))

    def _weight(self, key: str, values: NDArray, name: str) -> None:
        """Writes `values` in weight_dtype; raises MptTrtError when one is not finite there."""
        with self._entry(key, self.weight_dtype, values.shape) as stream:
            for piece in _pieces(values):
                stored = convert(piece, self.weight_dtype)
                if not is_finite(stored):
                    raise MptTrtError(
                        f"{name} holds NaN, Inf or values that {self.weight_dtype} cannot hold; "
                        "calibrate with --dtype float32, or check the checkpoint"
                    )
                stream.write(memoryview(stored.data).cast("B"))

    def _scalar(self, key: str, value: float) -> None:
        self._write(key, np.array([value], np.float32))

    def _write(self, key: str, values: NDArray) -> None:
        with self._entry(key, values.dtype, values.shape) as stream:
            write_in_pieces(stream, np.ascontiguousarray(values))

    @contextlib.contextmanager
    def _entry(self, key: str, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
        """Opens an array of the archive; its elements, in C order, are written to the stream."""
        entry = zipfile.ZipInfo(f"{key}.npy", TIME_STAMP)
        header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with self.archive.open(entry, "w", force_zip64=True) as stream:
            npy.write_array_header_1_0(stream, header)
            yield stream


def require_replaceable_result(target: Path, force: bool) -> None:
    """Raises MptTrtError when `target` is a file that `calibration_writer` did not write.

    Force permits any file, but no folder and no link, which may point to the model itself.
    """
    require_writable(target)
    if target.is_symlink():
        raise MptTrtError(
            f"{target}: not replaced, because it is a link to {target.readlink()}; remove the "
            "link, or choose another --export_path"
        )
    if force or not target.is_file():
        return
    try:
        with zipfile.ZipFile(target) as archive:
            is_own = archive.comment == MARK
    except ARCHIVE_ERRORS:
        is_own = False
    if not is_own:
        raise MptTrtError(
            f"{target}: not replaced, because quantize.py did not write it; choose another "
            "--export_path, or replace the file with --force"
        )


@contextlib.contextmanager
def calibration_writer(
    target: Path, config: MptConfig, reader: WeightReader, weight_dtype: np.dtype
) -> Iterator[CalibrationWriter]:
    """Writes `target` completely or not at all. reader: reader of the calibrated model."""
    with replace_file(target) as partial, zipfile.ZipFile(partial, "w") as archive:
        archive.comment = MARK
        yield CalibrationWriter(archive, config, reader, weight_dtype)


def _pieces(values: NDArray) -> Iterator[NDArray]:
    """Yields the elements in C order, in flat parts that fit into the processor's cache."""
    flat, step = values.reshape(-1), WRITE_BYTES // values.itemsize
    for start in range(0, flat.size, step):
        yield flat[start : start + step]
