"""Tensors of a linear layer in TensorRT-LLM's checkpoint, for each kind of quantization.

Its matrices are `[out_features, in_features]`; those of FT files and of mpt-trt's networks are
`[in_features, out_features]`. Integers and E4M3 values are the same as in those networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES, convert, transposed_copy
from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.calibration.rank_blocks import held_blocks
from mpt_trt.calibration.result import CalibrationResult
from mpt_trt.engines.backend_support import mixed_is_unsupported, uses_plugin_form
from mpt_trt.engines.trtllm.names import module_name
from mpt_trt.engines.trtllm.safetensors_file import E4M3, StreamedTensor
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import FtFile, held, linear_name
from mpt_trt.model.sharding import Range, Rank
from mpt_trt.model.tensors import Weight, preceding_norm
from mpt_trt.network.linear.smoothquant import require_smoothed
from mpt_trt.quantization.awq import quantized_rows
from mpt_trt.quantization.calibrated_weights import INT8_MAX
from mpt_trt.quantization.fp8 import quantized_block
from mpt_trt.quantization.integers import pack_int4_rows
from mpt_trt.quantization.schemes import Awq, Fp8, Gptq, Mixed, SmoothQuant, WeightOnly

FLOAT32, INT8 = np.dtype(np.float32), np.dtype(np.int8)
# Columns of an FT file that are transposed together: few enough for a small block of memory, and
# enough for long reads.
BLOCK_COLUMNS = 256

Tensors = dict[str, StreamedTensor]


class LinearForm(Protocol):
    """Linear layers of one rank in the checkpoint."""

    def tensors(self, weight: Weight) -> Tensors:
        """Tensors of the layer of `weight` by full name."""
        ...


def choose_form(
    checkpoint: FtCheckpoint, rank: Rank, calibrated: CalibratedQuantization
) -> LinearForm:
    """Chooses the form for a quantization.

    Raises MptTrtError for a smoothed checkpoint that should be plain, and the reverse.
    """
    scheme = calibrated.quantization.scheme
    if isinstance(scheme, SmoothQuant) and uses_plugin_form(scheme):
        return PluginSmoothQuantForm(checkpoint, rank, scheme)
    checkpoint.require_plain()
    match scheme:
        case Awq() | Gptq():
            return AwqForm(checkpoint, rank, calibrated.required_calibration)
        case Fp8():
            return Fp8Form(checkpoint, rank, calibrated.required_calibration)
        case SmoothQuant():
            return ModelOptSmoothQuantForm(checkpoint, rank, calibrated.required_calibration)
        case Mixed():
            raise mixed_is_unsupported()
        case WeightOnly() | None:
            return PlainForm(checkpoint, rank)


# --- from FT files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainForm:
    """Unchanged matrices, which `trtllm-build` quantizes for weight-only variants."""

    checkpoint: FtCheckpoint
    rank: Rank

    def tensors(self, weight: Weight) -> Tensors:
        stored = self.checkpoint.matrix(weight, self.rank)
        return {f"{module_name(linear_name(weight))}.weight": transposed(stored, stored.dtype)}


@dataclass(frozen=True)
class Fp8Form:
    """E4M3 matrices, with a scale for each matrix and one for its input."""

    checkpoint: FtCheckpoint
    rank: Rank
    calibration: CalibrationResult

    def tensors(self, weight: Weight) -> Tensors:
        module = module_name(linear_name(weight))
        scales = self.calibration.fp8_scales(*weight.place)
        scale = scales.weight or 1.0
        stored = self.checkpoint.matrix(weight, self.rank)
        return {
            f"{module}.weight": transposed(
                stored, E4M3, lambda block: quantized_block(block, scale)
            ),
            f"{module}.weights_scaling_factor": vector([scale]),
            f"{module}.activation_scaling_factor": vector([scales.activation or 1.0]),
        }


@dataclass(frozen=True)
class PluginSmoothQuantForm:
    """int8 matrices of a smoothed FT checkpoint, for TensorRT-LLM's SmoothQuant plugins.

    QKV and the first feed-forward matrix follow a norm, which applies the smoothing and quantizes
    (`scale_to_int`). The inputs of the other matrices are divided by `smoother`.

    Raises MptTrtError when the checkpoint is not smoothed, or was smoothed with another alpha.
    """

    checkpoint: FtCheckpoint
    rank: Rank
    scheme: SmoothQuant

    def __post_init__(self) -> None:
        require_smoothed(self.checkpoint, self.scheme.alpha)

    def tensors(self, weight: Weight) -> Tensors:
        name = linear_name(weight)
        module = module_name(name)
        files = self.checkpoint.rank_int8_files(self.rank)[name]
        by_column, by_token = self.scheme.per_channel, self.scheme.per_token
        matrix = self._read(files.weight_col if by_column else files.weight)
        if by_token:
            scale = files.scale_w_quant_orig_col if by_column else files.scale_w_quant_orig
        else:
            scale = files.scale_y_accum_quant_col if by_column else files.scale_y_accum_quant
        tensors = {
            f"{module}.weight": transposed(matrix, INT8),
            # QKV always has one scale per column.
            f"{module}.per_channel_scale": vector(self._read(scale), (1, *scale.shape)),
        }
        input_scale = self._read(files.scale_x_orig_quant)
        if (norm := preceding_norm(weight)) is not None:
            # The norm computes scales per token itself.
            norm_scale = np.ones(1, np.float32) if by_token else input_scale
            tensors[f"{module_name(norm)}.scale_to_int"] = vector(norm_scale)
        else:
            # Only a norm can replace it.
            assert files.smoother is not None
            smoother = self._read(files.smoother)
            tensors[f"{module}.smoother"] = vector(smoother, (1, *smoother.shape))
        if not by_token:
            tensors[f"{module}.act_scale"] = vector(self._read(files.scale_y_quant_orig), (1, 1))
            if norm is None:
                parent = module.rpartition(".")[0]
                tensors[f"{parent}.quantization_scaling_factor"] = vector(input_scale)
        return tensors

    def _read(self, file: FtFile) -> NDArray:
        dtypes: dict[str, np.dtype] = {"int8": INT8, "float32": FLOAT32}
        path = self.checkpoint.folder / file.name
        return np.memmap(path, dtypes[file.dtype], "r", shape=file.shape)


# --- from calibration results --------------------------------------------------------------------


@dataclass(frozen=True)
class AwqForm:
    """4-bit integers in groups, two rows per byte; the input is multiplied by the pre-quant scale.

    Byte j of column c contains row 2j in its low half and row 2j + 1 in its high half.

    Raises MptTrtError when the calibration result has no groups.
    """

    checkpoint: FtCheckpoint
    rank: Rank
    calibration: CalibrationResult

    def tensors(self, weight: Weight) -> Tensors:
        module, group_size = module_name(linear_name(weight)), self.calibration.required_group_size
        rows, columns = held(self.checkpoint.config, weight, self.rank)
        height, width = sum(map(len, rows)), len(columns)

        def scales() -> NDArray[np.float32]:
            groups = Range(columns.start // group_size, columns.stop // group_size)
            return part_of(self.calibration.group_scales(*weight.place), rows, groups)

        def integers() -> Iterator[NDArray]:
            for block, block_scales in held_blocks(self.calibration, *weight.place, rows, columns):
                yield pack_int4_rows(quantized_rows(block, block_scales)).view(np.int8)

        return {
            f"{module}.weight": StreamedTensor(INT8, (height // 2, width), integers),
            f"{module}.weights_scaling_factor": StreamedTensor(
                FLOAT32, (height, width // group_size), lambda: iter([scales()])
            ),
            f"{module}.prequant_scaling_factor": _pre_quant_scale(self, weight, columns),
        }


@dataclass(frozen=True)
class ModelOptSmoothQuantForm:
    """int8 matrices with a scale per row, and one for the input after the pre-quant scale."""

    checkpoint: FtCheckpoint
    rank: Rank
    calibration: CalibrationResult

    def tensors(self, weight: Weight) -> Tensors:
        module = module_name(linear_name(weight))
        rows, columns = held(self.checkpoint.config, weight, self.rank)
        height, width = sum(map(len, rows)), len(columns)

        def integers() -> Iterator[NDArray]:
            whole = self.calibration.smoothquant_matrix(*weight.place)
            rounded = np.rint(part_of(whole.weight, rows, columns) / column_of(whole.scales, rows))
            yield rounded.clip(-INT8_MAX - 1, INT8_MAX).astype(np.int8)

        def scales() -> Iterator[NDArray]:
            yield column_of(self.calibration.smoothquant_scales(*weight.place)[0], rows)

        def input_scale() -> Iterator[NDArray]:
            _, _, scale = self.calibration.smoothquant_scales(*weight.place)
            yield np.array([scale], np.float32)

        return {
            f"{module}.weight": StreamedTensor(INT8, (height, width), integers),
            f"{module}.weights_scaling_factor": StreamedTensor(FLOAT32, (height,), scales),
            f"{module}.activation_scaling_factor": StreamedTensor(FLOAT32, (1,), input_scale),
            f"{module}.prequant_scaling_factor": _pre_quant_scale(self, weight, columns),
        }


def _pre_quant_scale(
    form: AwqForm | ModelOptSmoothQuantForm, weight: Weight, columns: Range
) -> StreamedTensor:
    dtype = STORAGE_TYPES[form.checkpoint.storage_type]

    def values() -> Iterator[NDArray]:
        whole = form.calibration.pre_quant_scale(*weight.place)
        stored = convert(np.ascontiguousarray(whole[columns.start : columns.stop]), dtype)
        if not np.isfinite(stored.astype(np.float32)).all():
            raise MptTrtError(
                f"{form.calibration.path}: pre-quant scales of {linear_name(weight)} are beyond "
                f"{dtype}; choose dtype bfloat16"
            )
        yield stored

    return StreamedTensor(dtype, (len(columns),), values)


# --- arrays --------------------------------------------------------------------------------------


def transposed(
    stored: NDArray,
    dtype: np.dtype,
    change: Callable[[NDArray], NDArray] = lambda block: block,
) -> StreamedTensor:
    """Makes the transpose `[out, in]` of an array, after applying `change` to its blocks."""

    def blocks() -> Iterator[NDArray]:
        for start in range(0, stored.shape[1], BLOCK_COLUMNS):
            block = change(np.ascontiguousarray(stored[:, start : start + BLOCK_COLUMNS]))
            yield transposed_copy(block).view(dtype)

    return StreamedTensor(dtype, stored.shape[::-1], blocks)


def vector(values: NDArray | list[float], shape: tuple[int, ...] | None = None) -> StreamedTensor:
    """Makes a short float32 vector. shape: stored shape, by default one-dimensional."""
    stored = np.asarray(values, np.float32)
    return StreamedTensor(FLOAT32, stored.shape if shape is None else shape, lambda: iter([stored]))


def part_of(whole: NDArray, rows: list[Range], columns: Range) -> NDArray:
    """Selects rows and columns of a matrix."""
    return np.concatenate(
        [whole[row.start : row.stop, columns.start : columns.stop] for row in rows]
    )


def column_of(whole: NDArray, rows: list[Range]) -> NDArray:
    """Selects elements of a vector, `[rows, 1]`."""
    return part_of(whole[:, None], rows, Range(0, 1))
