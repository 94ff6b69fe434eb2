"""What a variant's TensorRT-LLM checkpoint is made from."""

from __future__ import annotations

from mpt_trt.artifacts import (
    CalibrationName,
    FtStorage,
    calibration_of,
    ft_storage_of,
)
from mpt_trt.capabilities import uses_modelopt_form
from mpt_trt.quantization.scheme import Quantization, Scheme


def trtllm_ft_storage(dtype: str, scheme: Scheme | None) -> FtStorage:
    """The FT checkpoint; a smoothed one for the plugin form of SmoothQuant alone."""
    return ft_storage_of(dtype, None if uses_modelopt_form(scheme) else scheme)


def trtllm_calibration(quantization: Quantization) -> CalibrationName | None:
    """The calibration result; None when none is needed."""
    if uses_modelopt_form(quantization.scheme):
        return CalibrationName("int8_sq")
    return calibration_of(quantization.scheme, quantization.kv_cache)
