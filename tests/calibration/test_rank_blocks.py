"""The rows of a matrix that a rank holds, in blocks."""

from __future__ import annotations

import numpy as np
import pytest

from mpt_trt.calibration import rank_blocks
from mpt_trt.model.sharding import Range


@pytest.mark.parametrize("rows_read", [1, 7, 64])
@pytest.mark.parametrize("rows_at_a_time", [2, 10, 128])
def test_rows_that_a_rank_holds_come_in_order(rows_read: int, rows_at_a_time: int) -> None:
    matrix = np.arange(90 * 8, dtype=np.float32).reshape(90, 8)
    blocks = (matrix[start : start + rows_read] for start in range(0, 90, rows_read))
    rows, columns = [Range(3, 30), Range(60, 63), Range(75, 90)], Range(2, 6)
    parts = rank_blocks._held_parts(blocks, rows, columns)
    found = [block.copy() for block in rank_blocks._joined(parts, rows_at_a_time)]
    assert all(len(block) == rows_at_a_time for block in found[:-1])
    expected = np.concatenate([matrix[part.start : part.stop, 2:6] for part in rows])
    np.testing.assert_array_equal(np.concatenate(found), expected)
