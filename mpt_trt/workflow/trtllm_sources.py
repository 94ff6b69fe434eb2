"""Inputs of a variant's TensorRT-LLM checkpoint."""

from __future__ import annotations

from mpt_trt.engines.backend_support import uses_modelopt_form
from mpt_trt.quantization.schemes import Quantization, WeightQuantization
from mpt_trt.workflow.target_names import CalibrationName, FtStorage, calibration_of, ft_storage_of


def trtllm_ft_storage(dtype: str, scheme: WeightQuantization | None) -> FtStorage:
    """Storage of the FT checkpoint; only the plugin form of SmoothQuant needs a smoothed one."""
    return ft_storage_of(dtype, None if uses_modelopt_form(scheme) else scheme)


def trtllm_calibration(quantization: Quantization) -> CalibrationName | None:
    """Calibration result; None if none is needed."""
    if uses_modelopt_form(quantization.scheme):
        return CalibrationName("int8_sq")
    return calibration_of(quantization.scheme, quantization.kv_cache)
