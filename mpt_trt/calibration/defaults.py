"""Facts of calibration that are not keys of config.yaml, without imports of libraries."""

from __future__ import annotations

from pathlib import Path

TEXT = Path(__file__).with_name("calibration.txt")
"""The calibration text that ships with mpt-trt."""

FILE_NAME = "mpt_tp1_rank0.npz"
"""Name of a result in its folder, as AMMO gives it."""

BATCH_SIZE = 8
"""Maximum number of samples per batch."""
