"""Reads calibration results of mpt-trt and AMMO, and checks that they belong to a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpt_trt.calibration.defaults import FILE_NAME
from mpt_trt.calibration.npz_file import NpzFile
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
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.joined_tensors import FtTensors
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import BlockMatrix, Weight, block_matrices, weights
from mpt_trt.quantization.calibrated_weights import (
    AwqMatrix,
    Fp8Scales,
    KvAmax,
    SmoothQuantMatrix,
)
from mpt_trt.quantization.schemes import (
    GROUPED,
    ROUNDED,
    IntegerFormat,
    QuantizationFormat,
    ScaleChoice,
)

# Weights of the same model may have been rounded to bfloat16 on both sides.
RELATIVE_TOLERANCE = 2.0**-7
# The smallest step of float16.
ABSOLUTE_TOLERANCE = 2.0**-24


def read_calibration(path: Path, checkpoint: FtCheckpoint) -> CalibrationResult:
    """Opens a calibration result of mpt-trt or AMMO for a model.

    Raises MptTrtError, with the difference and the remedy, when the file is damaged or was made for
    a model with another architecture or other weights.
    """
    if path.is_dir():
        raise MptTrtError(f"{path}: a folder; name the file {FILE_NAME} in it")
    file = NpzFile(path)
    result = CalibrationResult(file, checkpoint.config)
    _require_layers(file, checkpoint.config)
    _require_same_weights(file, checkpoint)
    if result.quantization_format in WITH_MATRICES:
        for layer in range(checkpoint.config.num_layers):
            for matrix, weight in block_matrices(checkpoint.config, layer).items():
                _require_shapes(result, layer, matrix, weight)
    return result


@dataclass(frozen=True)
class CalibrationResult:
    """Results of calibration, by layer and matrix."""

    file: NpzFile
    config: MptConfig

    @property
    def path(self) -> Path:
        """The npz file."""
        return self.file.path

    @cached_property
    def quantization_format(self) -> QuantizationFormat:
        """Infers the format from the keys, because AMMO's files do not name it."""
        if BUDGET in self.file.keys:
            return "mixed"
        if bits_key(0, BlockMatrix.OUTPUT) in self.file.keys:
            return "int4_gptq"
        base = matrix_keys(0, BlockMatrix.OUTPUT)[0]
        is_quantized = f"{base}:{ACTIVATION_SCALE}" in self.file.keys
        if f"{base}:{SMOOTHING}" in self.file.keys:
            return "int8_sq" if is_quantized else "int4_awq"
        return "fp8" if is_quantized else "kv_cache"

    @cached_property
    def group_size(self) -> int | None:
        """Input features that share a scale; None unless the format has groups."""
        if self.quantization_format not in GROUPED:
            return None
        base = matrix_keys(0, BlockMatrix.OUTPUT)[0]
        elements = math.prod(self.file.shape(f"{base}:{WEIGHT}"))
        scales = math.prod(self.file.shape(f"{base}:{WEIGHT_SCALE}"))
        if not scales or elements % scales:
            raise self.file.refused(f"{base} has {scales} scales for {elements} weights")
        return elements // scales

    @property
    def required_group_size(self) -> int:
        """Input features that share a scale; raises MptTrtError unless the format has groups."""
        self._require_groups()
        assert self.group_size is not None
        return self.group_size

    @property
    def budget(self) -> float:
        """Bits per weight that a result of mixed was made for."""
        self.require_format("mixed")
        # float32 stores a few more digits.
        return round(self._scalar(BUDGET), 4)

    @property
    def scales(self) -> ScaleChoice:
        """How the scales of int4_awq were chosen."""
        return "error" if SCALES_BY_ERROR in self.file.keys else "amax"

    def integer_format(self, layer: int, matrix: BlockMatrix) -> IntegerFormat:
        """The form of a matrix's integers; raises MptTrtError for one that is unknown."""
        self._require_groups()
        _, in_features = block_matrices(self.config, layer)[matrix].shape
        scales = math.prod(self.file.shape(f"{matrix_keys(layer, matrix)[0]}:{WEIGHT_SCALE}"))
        rows = self.file.shape(f"{matrix_keys(layer, matrix)[0]}:{WEIGHT}")[0]
        bits = 4
        if self.quantization_format in ROUNDED:
            bits = int(self._scalar(bits_key(layer, matrix)))
        group_size = in_features * rows // max(1, scales)
        form = IntegerFormat(bits, None if bits == 8 else group_size)
        if bits not in (4, 8) or scales * group_size != in_features * rows:
            raise self.file.refused(
                f"layers.{layer}.{matrix} has {scales} scales of {rows} rows and {bits} bits"
            )
        if bits == 8 and group_size != in_features:
            raise self.file.refused(f"layers.{layer}.{matrix} has int8 in groups of {group_size}")
        return form

    def integer_formats(self) -> tuple[str, ...]:
        """Names of the formats of all matrices, by layer and then in the order of BlockMatrix."""
        return tuple(
            self.integer_format(layer, matrix).name
            for layer in range(self.config.num_layers)
            for matrix in BlockMatrix
        )

    def awq_matrix(self, layer: int, matrix: BlockMatrix) -> AwqMatrix:
        """Reads a matrix; raises MptTrtError unless the format is int4_awq."""
        self.require_format("int4_awq")
        weight, scales = self._weight(layer, matrix), self.group_scales(layer, matrix)
        return AwqMatrix(weight, scales, self._smoothing(layer, matrix))

    def grouped_rows(self, layer: int, matrix: BlockMatrix, number: int) -> Iterator[NDArray]:
        """Yields the weight of a matrix in groups, up to `number` rows at a time."""
        self._require_groups()
        for key in matrix_keys(layer, matrix):
            yield from self.file.rows(f"{key}:{WEIGHT}", number)

    def group_scales(self, layer: int, matrix: BlockMatrix) -> NDArray[np.float32]:
        """Reads scales `[out, in / group_size]`, without the matrix.

        Those of int4_gptq, or chosen by error, may be negative; none is 0.
        """
        self._require_groups()
        out_features, _ = block_matrices(self.config, layer)[matrix].shape
        return self._joined(layer, matrix, WEIGHT_SCALE).reshape(out_features, -1)

    def pre_quant_scale(self, layer: int, matrix: BlockMatrix) -> NDArray[np.float32]:
        """Reads the factors of a matrix's input features, `[in]`, without the matrix."""
        return self._smoothing(layer, matrix)

    def smoothquant_matrix(self, layer: int, matrix: BlockMatrix) -> SmoothQuantMatrix:
        """Reads a matrix; raises MptTrtError unless the format is int8_sq."""
        self.require_format("int8_sq")
        return SmoothQuantMatrix(
            self._weight(layer, matrix),
            *self.smoothquant_scales(layer, matrix),
        )

    def smoothquant_scales(
        self, layer: int, matrix: BlockMatrix
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
        """Reads scales `[out]`, pre-quant scale `[in]` and activation scale, without the matrix."""
        self.require_format("int8_sq")
        return (
            self._joined(layer, matrix, WEIGHT_SCALE),
            self._smoothing(layer, matrix),
            self._largest(layer, matrix, ACTIVATION_SCALE),
        )

    def fp8_scales(self, layer: int, matrix: BlockMatrix) -> Fp8Scales:
        """Reads scales; those of QKV are the largest of Q, K and V."""
        self.require_format("fp8")
        return Fp8Scales(
            self._largest(layer, matrix, WEIGHT_SCALE),
            self._largest(layer, matrix, ACTIVATION_SCALE),
        )

    def kv_amax(self, layer: int) -> KvAmax:
        """Reads the amax of keys and values; raises MptTrtError for AMMO's files, which lack it."""
        if amax_key(layer, "key") not in self.file.keys:
            raise self.file.refused(
                "holds no amax of keys and values, like files made by AMMO; an 8-bit KV cache "
                "needs it"
            )
        return KvAmax(*(self._scalar(amax_key(layer, name)) for name in ("key", "value")))

    def require_format(self, needed: QuantizationFormat) -> None:
        """Raises MptTrtError when the result is of another format."""
        if self.quantization_format != needed:
            raise MptTrtError(
                f"{self.file.path}: holds the result of {self.quantization_format}, but {needed} "
                f"is needed; calibrate with --qformat {needed}"
            )

    def rounded_matrix(
        self, layer: int, matrix: BlockMatrix
    ) -> tuple[NDArray, NDArray[np.float32]]:
        """Reads a rounded matrix `[out, in]` and its scales `[out, in / group_size]`."""
        return self._weight(layer, matrix), self.group_scales(layer, matrix)

    def _require_groups(self) -> None:
        if self.quantization_format not in (*GROUPED, *ROUNDED):
            self.require_format(GROUPED[0])

    def _weight(self, layer: int, matrix: BlockMatrix) -> NDArray:
        """Reads a matrix (rows Q | K | V for QKV) in the type in which it is stored."""
        keys = matrix_keys(layer, matrix)
        parts = [self.file.numbers(f"{key}:{WEIGHT}") for key in keys]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _joined(self, layer: int, matrix: BlockMatrix, name: str) -> NDArray[np.float32]:
        """Reads flat scales, those of Q, K and V joined."""
        is_signed = self.quantization_format in ROUNDED or self.scales == "error"
        read = self._nonzero if is_signed else self._positive
        parts = [read(f"{key}:{name}") for key in matrix_keys(layer, matrix)]
        return np.concatenate([part.reshape(-1) for part in parts])

    def _positive(self, key: str) -> NDArray[np.float32]:
        values = self.file.floats(key)
        if not (values > 0).all():
            raise self.file.refused(f"{key} holds {values.min()}, not positive")
        return values

    def _nonzero(self, key: str) -> NDArray[np.float32]:
        values = self.file.floats(key)
        if not values.all():
            raise self.file.refused(f"{key} holds 0, but must be positive")
        return values

    def _smoothing(self, layer: int, matrix: BlockMatrix) -> NDArray[np.float32]:
        keys = matrix_keys(layer, matrix)
        first, *others = (self._positive(f"{key}:{SMOOTHING}") for key in keys)
        for key, other in zip(keys[1:], others, strict=True):
            if not np.array_equal(first, other):
                raise self.file.refused(
                    f"{key}:{SMOOTHING} differs from that of {keys[0]}, although both multiply the "
                    "same activations"
                )
        return first

    def _largest(self, layer: int, matrix: BlockMatrix, name: str) -> float:
        return max(self._scalar(f"{key}:{name}") for key in matrix_keys(layer, matrix))

    def _scalar(self, key: str) -> float:
        number = math.prod(self.file.shape(key))
        if number != 1:
            raise self.file.refused(f"{key} holds {number} values instead of one")
        return float(self._positive(key).item())


# --- check that a file belongs to a model --------------------------------------------------------


def _require_layers(file: NpzFile, config: MptConfig) -> None:
    norm = re.compile(r"_np:layers:[0-9]+:input_layernorm:weight")
    num_layers = sum(bool(norm.fullmatch(key)) for key in file.keys)
    if num_layers == 0:
        raise file.refused("holds no layers in AMMO's layout")
    if num_layers != config.num_layers:
        raise _other_model(file, "the number of layers", num_layers, config.num_layers)


def _require_same_weights(file: NpzFile, checkpoint: FtCheckpoint) -> None:
    """Compares the model's own weights in the file with those of the checkpoint."""
    tensors = FtTensors(checkpoint)
    for weight in weights(checkpoint.config):
        # Smoothing changes the blocks' weights, but neither keys nor values.
        if checkpoint.smoothing is not None and weight.name.startswith("layers."):
            continue
        ammo_key = whole_key(weight)
        most: tuple[int, ...]
        if shape_key(weight) in file.keys:
            shape = tuple(file.array(shape_key(weight), most=len(weight.shape)).tolist())
            key, most = corner_key(weight), CORNER
        elif ammo_key is not None and ammo_key in file.keys:
            shape, key, most = file.shape(ammo_key), ammo_key, weight.shape
        else:
            continue
        if shape != weight.shape:
            raise _other_model(file, f"the shape of {weight.name}", list(shape), list(weight.shape))
        recorded_shape = file.shape(key)
        if len(recorded_shape) != len(weight.shape) or any(
            size > limit for size, limit in zip(recorded_shape, most, strict=False)
        ):
            raise file.refused(f"{key} has shape {list(recorded_shape)}")
        recorded = file.floats(key)
        expected = tensors.corner(weight, recorded.shape).astype(np.float32)
        _require_near(file, weight.name, recorded[tuple(map(slice, expected.shape))], expected)


def _require_near(file: NpzFile, name: str, recorded: NDArray, expected: NDArray) -> None:
    is_near = np.isclose(recorded, expected, RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE)
    if not is_near.all():
        place = tuple(int(i) for i in np.argwhere(~is_near)[0])
        what = f"{name} at {list(place)}"
        raise _other_model(file, what, f"{recorded[place]:g}", f"{expected[place]:g}")


def _require_shapes(
    result: CalibrationResult, layer: int, matrix: BlockMatrix, weight: Weight
) -> None:
    """Raises MptTrtError when a matrix or its scales have another shape than the model's."""
    file, group_size = result.file, result.group_size
    if result.quantization_format == "mixed":
        group_size = result.integer_format(layer, matrix).group_size
    out_features, in_features = weight.shape
    if group_size is not None and in_features % group_size:
        raise file.refused(
            f"groups of {group_size} do not divide the {in_features} input features of "
            f"{weight.name}"
        )
    scales_per_row = 1 if group_size is None else in_features // group_size
    heights = heights_of(result.config, matrix, out_features)
    for key, height in zip(matrix_keys(layer, matrix), heights, strict=True):
        for name, expected in ((WEIGHT, (height, in_features)), (SMOOTHING, (in_features,))):
            shape = file.shape(f"{key}:{name}")
            if shape != expected:
                what = f"the shape of {key}:{name}"
                raise _other_model(file, what, list(shape), list(expected))
        num_scales = math.prod(file.shape(f"{key}:{WEIGHT_SCALE}"))
        if num_scales != height * scales_per_row:
            raise file.refused(
                f"{key}:{WEIGHT_SCALE} holds {num_scales} scales instead of "
                f"{height * scales_per_row}"
            )


def _other_model(file: NpzFile, what: str, recorded: object, expected: object) -> MptTrtError:
    return file.refused(
        f"made for another model: {what} is {recorded} there, but {expected} in the checkpoint"
    )
