"""Settings of a calibration."""

from __future__ import annotations

from dataclasses import dataclass

from mpt_trt.quantization.schemes import QuantizationFormat, ScaleChoice


@dataclass(frozen=True)
class CalibrationPlan:
    """Format of a calibration.

    group_size: input features that share a scale, for formats in groups. bits: budget per weight,
    for mixed. scales: choice of a group's scale, for int4_awq.
    """

    quantization_format: QuantizationFormat
    group_size: int | None = None
    bits: float | None = None
    scales: ScaleChoice = "amax"

    @property
    def required_group_size(self) -> int:
        """Group size of a format with groups."""
        assert self.group_size is not None, f"{self.quantization_format} without a group size"
        return self.group_size
