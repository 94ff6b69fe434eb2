"""Whole tensors, joined from the files of all ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.ft.joined_tensors import FtTensors
from mpt_trt.model.tensors import weights
from support.checkpoints import CheckpointSpec, tensors, write_checkpoint
from support.ft import write_ft


@pytest.mark.parametrize("num_kv_heads", [None, 4, 2, 1])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_ranks_are_joined_to_the_models_tensors(
    num_kv_heads: int | None, tp_size: int, tmp_path: Path
) -> None:
    spec = CheckpointSpec(num_kv_heads=num_kv_heads, no_bias=False, qk_ln=True, alibi=False)
    config = write_ft(write_checkpoint(tmp_path / "hf", spec), tmp_path / "ft", tp_size=tp_size)
    reader = FtTensors(read_ft_checkpoint(tmp_path / "ft"))
    expected = tensors(spec)
    for weight in weights(config):
        found = reader.tensor(weight)
        np.testing.assert_array_equal(found, expected[f"transformer.{weight.hf_name}"])
        corner = reader.corner(weight, (8, 64)[: found.ndim])
        assert corner.size
        np.testing.assert_array_equal(corner, found[tuple(map(slice, corner.shape))])
