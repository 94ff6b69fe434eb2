"""A small model and its artifacts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from support.checkpoints import CheckpointSpec


@dataclass(frozen=True)
class Built:
    """A small model on its way: its spec, and the folders that it became. Not to be changed."""

    spec: CheckpointSpec
    hf: Path
    ft: Path
    engine: Path

    @property
    def checkpoint(self) -> FtCheckpoint:
        return read_ft_checkpoint(self.ft)
