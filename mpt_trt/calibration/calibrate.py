"""Calibrates a model, one block after the other, for any format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from mpt_trt.calibration.block_stream import (
    Computation,
    SampleRun,
    observed_cache,
    stream_blocks,
)
from mpt_trt.calibration.gptq import GptqCalibration
from mpt_trt.calibration.model_source import ModelSource
from mpt_trt.calibration.modelopt import calibrated_by_modelopt
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.calibration.sensitivity import measured_formats
from mpt_trt.calibration.writer import calibration_writer
from mpt_trt.model.tensors import BlockMatrix
from mpt_trt.model.torch_block import PlainBlock
from mpt_trt.quantization.calibrated_weights import CalibratedMatrix
from mpt_trt.quantization.schemes import IntegerFormat
from mpt_trt.system.background import background


def calibrate(
    source: ModelSource,
    samples: Tensor,
    plan: CalibrationPlan,
    computation: Computation,
    weight_dtype: np.dtype,
    target: Path,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Calibrates a model and writes the result to the npz file `target`, or nothing at all.

    samples: token ids, int64 `[number, seq]`. weight_dtype: float16 or float32, the type of weights
    in the file. advance is called after each block. A block is written while the next one is
    calibrated.

    Raises MptTrtError for samples that the model cannot read, and for values that the computation's
    type or weight_dtype cannot represent.
    """
    calibrated = _block_calibration(source, samples, plan, computation, weight_dtype)
    # The writer is opened first, so that it closes the file after the last block is written.
    with (
        calibration_writer(target, source.config, source.reader, weight_dtype) as writer,
        background() as writing,
    ):
        writing.start(partial(writer.model, plan))

        def visit(layer: int, block: PlainBlock, run: SampleRun) -> None:
            with observed_cache(block) as cache_amax:
                matrices = calibrated(block, run)
            writing.start(partial(writer.block, layer, cache_amax(), matrices))
            advance()

        stream_blocks(source, samples, computation, visit)


BlockCalibration = Callable[[PlainBlock, SampleRun], dict[BlockMatrix, CalibratedMatrix]]
"""Function that runs a block on all samples and returns the results of its matrices."""


def _block_calibration(
    source: ModelSource,
    samples: Tensor,
    plan: CalibrationPlan,
    computation: Computation,
    weight_dtype: np.dtype,
) -> BlockCalibration:
    match plan.quantization_format:
        case "kv_cache":
            return _run_only
        case "int4_gptq":
            form = IntegerFormat(4, plan.required_group_size)
            each_layer = dict.fromkeys(BlockMatrix, form)
            return GptqCalibration([each_layer] * source.config.num_layers, weight_dtype)
        case "mixed":
            assert plan.bits is not None, "mixed without a budget"
            formats = measured_formats(source, samples, computation, plan.bits)
            return GptqCalibration(formats, weight_dtype)
        case _:
            return partial(calibrated_by_modelopt, plan, weight_dtype)


def _run_only(block: PlainBlock, run: SampleRun) -> dict[BlockMatrix, CalibratedMatrix]:
    run(block)
    return {}
