"""Calibration of a block by NVIDIA's ModelOpt."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from mpt_trt.quantization.grids import INT4
from mpt_trt.quantization.scale_search import search_scales
from mpt_trt.quantization.schemes import SMOOTHQUANT_ALPHA

log = logging.getLogger(__name__)


def calibrated_by_modelopt(
    plan: CalibrationPlan, weight_dtype: np.dtype, block: PlainBlock, run: SampleRun
) -> dict[BlockMatrix, CalibratedMatrix]:
    """Lets ModelOpt calibrate a block, in place, and reads its results for each linear layer."""
    squares = _mean_squares(block, run) if plan.scales == "error" else {}
    quantize_module(block, plan, run)
    matrices = {
        name: calibrated_matrix(module, plan, weight_dtype)
        for name, module in linear_modules(block).items()
    }
    # The plan has them for int4_awq only.
    for name, mean_square in squares.items():
        matrices[name] = _with_least_error(matrices[name], mean_square)
    return matrices


def _mean_squares(block: PlainBlock, run: SampleRun) -> dict[BlockMatrix, Tensor]:
    """Runs a block, and returns the mean square of each input feature, float32 `[in]`."""
    modules = linear_modules(block)
    with contextlib.ExitStack() as stack:
        by_batch = {name: stack.enter_context(_observed_squares(m)) for name, m in modules.items()}
        run(block)
    # Batches have equal sizes.
    return {name: torch.stack(squares).mean(0) for name, squares in by_batch.items()}


@contextlib.contextmanager
def _observed_squares(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list, to which each run adds the mean squares of its input features."""
    squares: list[Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda _, inputs: squares.append(inputs[0].float().square().flatten(0, -2).mean(0))
    )
    try:
        yield squares
    finally:
        handle.remove()


def _with_least_error(matrix: CalibratedMatrix, mean_square: Tensor) -> AwqMatrix:
    """Chooses scales by the squared error of the layer's output. mean_square: of its inputs."""
    assert isinstance(matrix, AwqMatrix), "only int4_awq has a choice of scales"
    out_features, num_groups = matrix.scales.shape
    device = mean_square.device
    weight = torch.from_numpy(matrix.weight).to(device).float()
    importance = mean_square * torch.from_numpy(matrix.pre_quant_scale).to(device).square()
    scales = search_scales(
        weight.reshape(out_features, num_groups, -1), importance.reshape(num_groups, -1), INT4
    )
    return replace(matrix, scales=scales.cpu().numpy())


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
