"""What a model is calibrated for."""

from __future__ import annotations

from dataclasses import dataclass

from mpt_trt.quantization.schemes import QuantizationFormat


@dataclass(frozen=True)
class CalibrationPlan:
    """What to calibrate for. group_size: input features that share a scale, for grouped formats."""

    quantization_format: QuantizationFormat
    group_size: int | None = None

    @property
    def required_group_size(self) -> int:
        """The group size of a format that has groups."""
        assert self.group_size is not None, f"{self.quantization_format} without a group size"
        return self.group_size
