"""Calibration of a block by NVIDIA's ModelOpt."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpt_trt.calibration.block_stream import SampleRun, linear_modules, not_finite, on_host
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.model.tensors import BlockMatrix
from mpt_trt.model.torch_block import PlainBlock
from mpt_trt.quantization.calibrated_weights import (
    FP8_MAX,
    INT4_MAX,
    INT8_MAX,
    AwqMatrix,
    CalibratedMatrix,
    Fp8Scales,
    SmoothQuantMatrix,
)
from mpt_trt.quantization.schemes import SMOOTHQUANT_ALPHA

log = logging.getLogger(__name__)


def calibrated_by_modelopt(
    plan: CalibrationPlan, weight_dtype: np.dtype, block: PlainBlock, run: SampleRun
) -> dict[BlockMatrix, CalibratedMatrix]:
    """Lets ModelOpt calibrate a block, in place, and reads its results for each linear layer."""
    quantize_module(block, plan, run)
    modules = linear_modules(block)
    return {name: calibrated_matrix(m, plan, weight_dtype) for name, m in modules.items()}


def quantize_module(
    module: nn.Module, plan: CalibrationPlan, forward_loop: Callable[[nn.Module], None]
) -> None:
    """Calibrates a module's linear layers in place."""
    # ModelOpt takes seconds to import, and -kv and -sq conversions do not need it.
    import modelopt.torch.quantization as mtq

    try:
        with _quiet():
            mtq.quantize(module, modelopt_config(plan), forward_loop)
    except AssertionError as error:
        # ModelOpt asserts that its calibrators see finite values.
        if re.search("detected (nan|inf) values", str(error)):
            raise not_finite() from None
        raise


def modelopt_config(plan: CalibrationPlan) -> dict[str, Any]:
    """Makes ModelOpt's preset of the format, with the plan's group size."""
    import modelopt.torch.quantization as mtq  # as above

    presets = {
        "int4_awq": mtq.INT4_AWQ_CFG,
        "fp8": mtq.FP8_DEFAULT_CFG,
        "int8_sq": mtq.INT8_SMOOTHQUANT_CFG,
    }
    config = copy.deepcopy(presets[plan.quantization_format])
    if plan.quantization_format == "int8_sq":
        config["algorithm"] = {"method": "smoothquant", "alpha": SMOOTHQUANT_ALPHA}
    for entry in config["quant_cfg"]:
        if "block_sizes" in (entry.get("cfg") or {}):
            entry["cfg"]["block_sizes"][-1] = plan.group_size
    return config


def calibrated_matrix(
    module: nn.Module, plan: CalibrationPlan, weight_dtype: np.dtype
) -> CalibratedMatrix:
    """Reads ModelOpt's results for one linear layer, with weights rounded to weight_dtype."""
    # ModelOpt adds these modules, which nn.Module's type lacks.
    weight: Any = module.weight_quantizer
    inputs: Any = module.input_quantizer
    if plan.quantization_format == "fp8":
        return Fp8Scales(_scale(weight.amax, FP8_MAX), _scale(inputs.amax, FP8_MAX))
    # Weights that are not finite are detected in their scales and when they are written.
    values = on_host(module.get_parameter("weight").detach().to(getattr(torch, weight_dtype.name)))
    smoothing = _floats(inputs.pre_quant_scale).reshape(-1)
    if plan.quantization_format == "int4_awq":
        group_scales = _scales(weight.amax, INT4_MAX).reshape(len(values), -1)
        return AwqMatrix(values, group_scales, smoothing)
    row_scales = _scales(weight.amax, INT8_MAX).reshape(-1)
    return SmoothQuantMatrix(values, row_scales, smoothing, _scale(inputs.amax, INT8_MAX))


def _scale(amax: Tensor, largest: int) -> float:
    return float(_scales(amax, largest).item())


def _scales(amax: Tensor, largest: int) -> NDArray[np.float32]:
    """Computes amax / largest; 1 instead of 0, because readers divide by scales."""
    scales = _floats(amax) / np.float32(largest)
    return np.where(scales == 0, np.float32(1), scales)


def _floats(values: Tensor) -> NDArray[np.float32]:
    floats = values.detach().float().cpu().numpy()
    if not np.isfinite(floats).all():
        raise not_finite()
    return floats


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Sends ModelOpt's output and warnings for each block to the debug log."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for line in [*printed.getvalue().splitlines(), *(str(w.message) for w in caught)]:
        log.debug("%s", line)
