"""Writes an FT checkpoint's files for 8-bit products: smoothed and int8 weights, and scales.

Every matrix is streamed three times: for the amax of each input feature, for the amax of each
output feature after smoothing, and into its files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES, convert, is_finite
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.layout import FtFile, Int8Files, Int8Layers, files_of, ft_file, held, int8_files
from mpt_trt.ft.streams import FtWriter, TensorSource
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Range, Rank
from mpt_trt.model.tensors import Split, Weight, preceding_norm, weights
from mpt_trt.quantization.activation_amax import ActivationAmax, amax_of, require_amax
from mpt_trt.quantization.smoothing import (
    Int8Scales,
    int8_scales,
    quantized,
    require_alpha,
    smoothed_norm,
    smoothed_weight,
    smoothing_factors,
)


@dataclass(frozen=True)
class Int8Conversion:
    """Inputs of int8 weights and scales.

    amax: amax of the activations. alpha: migration strength; None: no smoothing, and int8 files
    only for QKV, as with `-kv`. provenance: origin of the amax, recorded in the manifest.
    """

    amax: ActivationAmax
    alpha: float | None
    provenance: dict[str, Any]

    @property
    def layers(self) -> Int8Layers:
        """Linear layers that get int8 weights and scales."""
        return Int8Layers.QKV if self.alpha is None else Int8Layers.ALL

    def require_fitting(self, config: MptConfig) -> None:
        """Raises MptTrtError when the model cannot have such files, or the amax does not fit it."""
        require_calibratable(config, self.alpha)
        require_amax(self.amax, config)

    def writer(self, source: TensorSource, writer: FtWriter, tp_size: int) -> Int8Writer:
        """Makes the writer of these layers' files."""
        return Int8Writer(source, writer, tp_size, self.amax, self.alpha)


def require_calibratable(config: MptConfig, alpha: float | None) -> None:
    """Raises MptTrtError when the model cannot have int8 files of this kind."""
    if alpha is not None:
        require_alpha(alpha)
    elif config.qk_ln:
        raise MptTrtError(
            "qk_ln = True: the cache holds normalized keys, whose amax -kv cannot record; "
            "calibrate with quantize.py"
        )


@dataclass(frozen=True)
class Int8Writer:
    """Writes linear layers of one directory, and the norms that absorb their smoothing."""

    source: TensorSource
    writer: FtWriter
    tp_size: int
    amax: ActivationAmax
    alpha: float | None

    def write(self, weight: Weight) -> dict[str, str]:
        """Writes all files of a linear layer except its bias, and those of the norm before it.

        Returns content hashes by file name.

        Raises MptTrtError when smoothing takes a value beyond the storage type's range.
        """
        self.source.prefetch(weight)
        factors = self._factors(weight)
        scales = self._scales(weight, factors)
        hashes = self._write_norm(weight, factors)
        for rank in sharding.all_ranks(self.tp_size):
            files = int8_files(self.source.config, weight, rank)
            hashes |= self._write_matrices(weight, rank, files, factors, scales)
            for file, values in self._vectors(weight, rank, files, factors, scales):
                if file.name not in hashes:
                    hashes |= self.writer.write(file, [values.astype(np.float32)])
        return hashes

    def _factors(self, weight: Weight) -> NDArray[np.float64]:
        """Computes the factor of each input feature's weights, `[in_features]`."""
        input_amax = amax_of(self.amax, weight).x
        if self.alpha is None:
            return np.ones(input_amax.shape)
        blocks = self.source.rows(self._whole(weight))
        weight_amax = np.concatenate([_magnitudes(block).max(axis=1) for _, block in blocks])
        return smoothing_factors(input_amax, weight_amax, self.alpha, self._dtype)

    def _scales(self, weight: Weight, factors: NDArray[np.float64]) -> Int8Scales:
        config, amax = self.source.config, amax_of(self.amax, weight)
        weight_amax = np.zeros(weight.shape[0], np.float32)
        for block in self._smoothed(self._whole(weight), factors):
            np.maximum(weight_amax, _magnitudes(block).max(axis=0), out=weight_amax)
        parts, output_amax = [weight.shape[0]], float(amax.y.max())
        if weight.split is Split.QKV:
            parts = [config.hidden_size, config.kv_size, config.kv_size]
            if config.clip_qkv is not None:
                # The layer's output is used only after clipping.
                output_amax = min(output_amax, config.clip_qkv)
        input_amax = float((amax.x / factors).max())
        return int8_scales(weight_amax, parts, input_amax, output_amax, self._dtype)

    def _write_norm(self, weight: Weight, factors: NDArray[np.float64]) -> dict[str, str]:
        hashes: dict[str, str] = {}
        for norm in _norm_tensors(self.source, weight):
            (file,) = files_of(self.source.config, norm, self.tp_size, self.source.storage_type)
            values = np.concatenate([piece.copy() for piece in self.source.values(file)])
            smoothed = smoothed_norm(values, factors)
            self._require_finite(smoothed, norm)
            hashes |= self.writer.write(file, [smoothed])
        return hashes

    def _write_matrices(
        self,
        weight: Weight,
        rank: Rank,
        files: Int8Files,
        factors: NDArray[np.float64],
        scales: Int8Scales,
    ) -> dict[str, str]:
        """Writes a rank's weight in the storage type and in both kinds of int8."""
        config = self.source.config
        outputs, _ = held(config, weight, rank)
        by_tensor = _part(scales.w_orig_quant, outputs)
        by_column = _part(scales.w_orig_quant_col, outputs)
        file = ft_file(config, weight, rank, self.source.storage_type)
        with ExitStack() as stack:
            plain, int8, int8_col = (
                stack.enter_context(self.writer.open(each))
                for each in (file, files.weight, files.weight_col)
            )
            for block in self._smoothed(file, factors):
                plain.write(block)
                int8.write(quantized(block, by_tensor))
                int8_col.write(quantized(block, by_column))
        return {output.name: output.hash for output in (plain, int8, int8_col)}

    def _vectors(
        self,
        weight: Weight,
        rank: Rank,
        files: Int8Files,
        factors: NDArray[np.float64],
        scales: Int8Scales,
    ) -> Iterator[tuple[FtFile, NDArray[Any]]]:
        """Yields a rank's scales and smoother, with the file of each."""
        outputs, inputs = held(self.source.config, weight, rank)
        yield files.scale_x_orig_quant, np.array([scales.x_orig_quant])
        yield files.scale_y_quant_orig, np.array([scales.y_quant_orig])
        for file, values in (
            (files.scale_w_quant_orig, scales.w_quant_orig),
            (files.scale_w_quant_orig_col, scales.w_quant_orig_col),
            (files.scale_y_accum_quant, scales.y_accum_quant),
            (files.scale_y_accum_quant_col, scales.y_accum_quant_col),
        ):
            # If the whole matrix shares one scale, the file contains only the first value.
            yield file, _part(values, outputs)[: file.num_elements]
        if files.smoother is not None:
            yield files.smoother, factors[inputs.start : inputs.stop]

    def _smoothed(self, file: FtFile, factors: NDArray[np.float64]) -> Iterator[NDArray[Any]]:
        """Yields blocks of rows of a weight's file, smoothed, in the storage type."""
        for rows, block in self.source.rows(file):
            smoothed = smoothed_weight(block, factors[rows.start : rows.stop])
            self._require_finite(smoothed, file.weight)
            yield smoothed

    def _require_finite(self, smoothed: NDArray[Any], weight: Weight) -> None:
        if not is_finite(smoothed):
            raise MptTrtError(
                f"{self.source.describe(weight)}: smoothing with alpha {self.alpha:g} takes it "
                f"beyond {self.source.storage_type}; choose another alpha, or storage type "
                "bfloat16 or float32"
            )

    def _whole(self, weight: Weight) -> FtFile:
        return ft_file(self.source.config, weight, Rank(0, 1), self.source.storage_type)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return STORAGE_TYPES[self.source.storage_type]


def _norm_tensors(source: TensorSource, weight: Weight) -> list[Weight]:
    """Weight and bias of the norm before a linear layer; empty if no norm precedes it."""
    norm = preceding_norm(weight)
    names = {f"{norm}.weight", f"{norm}.bias"}
    return [other for other in weights(source.config) if other.name in names]


def _magnitudes(block: NDArray[Any]) -> NDArray[np.float32]:
    magnitudes: NDArray[np.float32] = np.abs(convert(block, np.dtype(np.float32)))
    return magnitudes


def _part(values: NDArray[Any], rows: list[Range]) -> NDArray[Any]:
    return np.concatenate([values[r.start : r.stop] for r in rows])
