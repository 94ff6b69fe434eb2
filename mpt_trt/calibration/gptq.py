"""Rounds a model's matrices with GPTQ, on their inputs while the model reads the samples.

A matrix is rounded with its inputs in the model as rounded so far, and approximates the outputs of
the unquantized model. So it also compensates for errors of earlier matrices (as in GPTAQ,
arXiv:2504.02692), and every sample has two hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mpt_trt.calibration.block_stream import SampleRun, linear_modules, not_finite, on_host
from mpt_trt.model.tensors import BlockMatrix
from mpt_trt.model.torch_block import PlainBlock
from mpt_trt.quantization.calibrated_weights import CalibratedMatrix, RoundedWeights
from mpt_trt.quantization.gptq import Statistics, round_with_gptq
from mpt_trt.quantization.grids import INT4, INT8
from mpt_trt.quantization.schemes import IntegerFormat


@dataclass
class GptqCalibration:
    """Rounds one block after the other to integers.

    formats: of the matrices, by layer. layer: the next one. hidden: the samples' hidden states in
    the model as rounded so far, in batches; empty before the first block.
    """

    formats: Sequence[Mapping[BlockMatrix, IntegerFormat]]
    weight_dtype: np.dtype
    layer: int = 0
    hidden: list[Tensor] = field(default_factory=list)

    def __call__(self, block: PlainBlock, run: SampleRun) -> dict[BlockMatrix, CalibratedMatrix]:
        """Runs a block on all samples and rounds its matrices, in place as well.

        Raises MptTrtError when the model computes NaN or Inf.
        """
        hidden = self.hidden or run.hidden
        modules = linear_modules(block)
        with contextlib.ExitStack() as stack:
            plain = {name: stack.enter_context(Inputs(m)) for name, m in modules.items()}
            run(block)
        matrices: dict[BlockMatrix, CalibratedMatrix] = {}
        # In the order of computation, because each matrix compensates for errors of earlier ones.
        for name, module in modules.items():
            statistics = _statistics(block, module, plain.pop(name), hidden, run.attention_bias)
            matrices[name] = self._rounded(module, statistics, self.formats[self.layer][name])
        self.layer += 1
        self.hidden = [block(batch, run.attention_bias) for batch in hidden]
        return matrices

    def _rounded(
        self, module: nn.Module, statistics: Statistics, form: IntegerFormat
    ) -> RoundedWeights:
        weight = module.get_parameter("weight")
        dequantized, scales = rounded_to(form, weight.float(), statistics)
        weight.copy_(dequantized)
        stored = dequantized.to(getattr(torch, self.weight_dtype.name))
        return RoundedWeights(on_host(stored), scales.cpu().numpy(), form.bits)


def rounded_to(
    form: IntegerFormat, weight: Tensor, statistics: Statistics
) -> tuple[Tensor, Tensor]:
    """Rounds a matrix, float32 `[out, in]`, to integers.

    Returns the weights that they stand for, and the scales `[out, in / group_size]`.
    """
    grid = INT4 if form.bits == INT4.bits else INT8
    rounded = round_with_gptq(weight, statistics, grid, form.group_size or weight.shape[1])
    return rounded.dequantized(), rounded.scales


class Inputs:
    """Records a module's inputs by batch, `[tokens, in]`, while the context is active."""

    def __init__(self, module: nn.Module):
        self._module = module
        self.batches: list[Tensor] = []

    def __enter__(self) -> Inputs:
        self._handle = self._module.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.batches.append(inputs[0].detach().flatten(0, -2))


class _LastInputs(Inputs):
    """Records a module's inputs and ends the block's run there, because the rest is not needed."""

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super()._keep(module, inputs)
        raise _Reached


class _Reached(Exception):
    """Raised when a module's inputs are known."""


def _statistics(
    block: PlainBlock,
    module: nn.Module,
    plain: Inputs,
    hidden: list[Tensor],
    attention_bias: Tensor,
) -> Statistics:
    """Sums over all tokens of a module's inputs; `plain` has those of the unquantized model."""
    weight = module.get_parameter("weight")
    statistics = Statistics.empty(weight.shape[1], weight.device)
    with _LastInputs(module) as inputs:
        for batch, expected in zip(hidden, plain.batches, strict=True):
            with contextlib.suppress(_Reached):
                block(batch, attention_bias)
            statistics.add(inputs.batches.pop(), expected)
    if not statistics.is_finite:
        raise not_finite()
    return statistics
