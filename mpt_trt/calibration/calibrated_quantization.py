"""A quantization together with the calibration result that it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpt_trt.calibration.result import CalibrationResult
from mpt_trt.errors import MptTrtError
from mpt_trt.quantization.schemes import (
    UNQUANTIZED,
    Awq,
    Mixed,
    Quantization,
    WeightQuantization,
    calibration_format,
    method_of,
)


@dataclass(frozen=True)
class CalibratedQuantization:
    """A quantization and the calibration result that it needs, if any.

    Raises MptTrtError when the calibration is missing or has another format.
    """

    quantization: Quantization = UNQUANTIZED
    calibration: CalibrationResult | None = None

    def __post_init__(self) -> None:
        needed = calibration_format(self.quantization.scheme, self.quantization.kv_cache)
        if needed is None:
            return
        method, cache = method_of(self.quantization.scheme), self.quantization.kv_cache
        what = f"a KV cache of {cache}" if needed == "kv_cache" else method
        if self.calibration is None:
            raise MptTrtError(
                f"{what} needs a calibration result: make one with quantize.py --qformat {needed} "
                "and name it (--calibration)"
            )
        available = self.calibration.quantization_format
        if needed != "kv_cache" and available != needed:
            raise MptTrtError(
                f"{self.calibration.path}: a calibration result of {available}, but {what} needs "
                f"one of {needed}; make it with quantize.py --qformat {needed}"
            )

    def with_choice(self) -> CalibratedQuantization:
        """Records the formats that the calibration of mixed has chosen, and the scales of int4_awq.

        Raises MptTrtError when mixed had another budget.
        """
        scheme, calibration = self.quantization.scheme, self.calibration
        if isinstance(scheme, Awq) and calibration is not None:
            return self._with_scheme(replace(scheme, scales=calibration.scales))
        if not isinstance(scheme, Mixed) or calibration is None:
            return self
        if calibration.budget != scheme.bits:
            raise MptTrtError(
                f"{calibration.path}: made for {calibration.budget:g} bits per weight, but "
                f"{scheme.bits:g} are needed; make it with quantize.py --qformat mixed --bits "
                f"{scheme.bits:g}"
            )
        return self._with_scheme(replace(scheme, formats=calibration.integer_formats()))

    def _with_scheme(self, scheme: WeightQuantization) -> CalibratedQuantization:
        return replace(self, quantization=replace(self.quantization, scheme=scheme))

    @property
    def required_calibration(self) -> CalibrationResult:
        """Returns the calibration result of a quantization that needs one."""
        assert self.calibration is not None, "calibrated without a result"
        return self.calibration


NOT_QUANTIZED = CalibratedQuantization()
