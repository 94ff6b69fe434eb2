"""Reads a rank's 4-bit integers and scales in groups from a calibration result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import transposed_copy
from mpt_trt.calibration.rank_blocks import BLOCK_ROWS, held_blocks
from mpt_trt.calibration.result import CalibrationResult
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.layout import held
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import Weight
from mpt_trt.quantization import integers
from mpt_trt.quantization.awq import quantized_rows
from mpt_trt.quantization.integers import BLOCK_ELEMENTS
from mpt_trt.quantization.schemes import require_fitting_groups


def require_group_size(
    calibration: CalibrationResult, config: MptConfig, rank: Rank, group_size: int
) -> None:
    """Raises MptTrtError when groups of a result do not fit the ranks."""
    if group_size % 2:
        raise calibration.file.refused(f"the group size {group_size} is odd")
    try:
        require_fitting_groups(config, rank.tp_size, group_size)
    except MptTrtError as error:
        raise MptTrtError(f"{calibration.path}: {error}") from None


@dataclass(frozen=True)
class Int4Groups:
    """A rank's part of a result's matrices, in the order of the network, `[in, out]`."""

    config: MptConfig
    rank: Rank
    calibration: CalibrationResult

    def packed_integers(self, weight: Weight) -> Iterator[NDArray[np.uint8]]:
        """Yields `[in, out / 2]`: pairs of output features, the even one in the low nibble."""
        rows, columns = held(self.config, weight, self.rank)
        packed = np.empty((len(columns), sum(map(len, rows)) // 2), np.uint8)
        start = 0
        for block, scales in held_blocks(self.calibration, *weight.place, rows, columns):
            stop = start + len(block) // 2
            _quantize_into(packed[:, start:stop], block, scales)
            start = stop
        yield packed

    def scales(self, weight: Weight) -> NDArray[np.float32]:
        """Reads scales, float32 `[in / group_size, out]`."""
        rows, columns = held(self.config, weight, self.rank)
        group_size = self.calibration.integer_format(*weight.place).group_size
        assert group_size is not None, "int8 has no groups"
        groups = slice(columns.start // group_size, columns.stop // group_size)
        whole = self.calibration.group_scales(*weight.place)
        held_scales = np.concatenate([whole[part.start : part.stop, groups] for part in rows])
        return np.ascontiguousarray(held_scales.T)


def _quantize_into(target: NDArray[np.uint8], rows: NDArray, scales: NDArray[np.float32]) -> None:
    """Fills `target` `[in, out / 2]` with the integers of an even number of rows `[out, in]`.

    scales: as in `quantized_rows`. Pairs are packed before they are transposed, which moves half
    the bytes.
    """
    group_size = rows.shape[1] // scales.shape[1]
    groups = max(1, BLOCK_ELEMENTS // (BLOCK_ROWS * group_size))
    for start in range(0, scales.shape[1], groups):
        part = slice(start * group_size, (start + groups) * group_size)
        integers_of_part = quantized_rows(rows[:, part], scales[:, start : start + groups])
        target[part] = transposed_copy(integers.pack_int4_rows(integers_of_part))
