"""Simulates an engine's rounding of weights, inputs and cache in a model's blocks.

It uses plain PyTorch, the definition of each method and the Hugging Face checkpoint, and shares no
code with networks and engines. Scales of activations come from the given text instead of a
calibration, and the weights of AWQ and GPTQ are rounded to nearest. So it does not give an engine's
exact logits, but the expected distance of a correct engine from the float32 model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mpt_trt.evaluation.reference import (
    Block,
    Head,
    head_of,
    last_norm,
    open_checkpoint,
    reference_block,
)
from mpt_trt.model.config import MptConfig
from mpt_trt.model.torch_block import PlainBlock, causal_bias, with_weights
from mpt_trt.model.torch_tensors import ModelTensors, embed
from mpt_trt.quantization.schemes import (
    UNQUANTIZED,
    Awq,
    Fp8,
    Gptq,
    Mixed,
    Quantization,
    SmoothQuant,
    WeightOnly,
    WeightQuantization,
    default_group_size,
)
from mpt_trt.system.progress_lines import Advance, no_progress

E4M3 = torch.float8_e4m3fn
# Replaces the amax of zeros.
SMALLEST = 1e-8
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rounding:
    """Rounding of an engine. dtype: float32, float16 or bfloat16, of weights and activations."""

    dtype: str
    quantization: Quantization = UNQUANTIZED

    @property
    def without_quantization(self) -> Rounding:
        return Rounding(self.dtype)

    def cast(self, values: Tensor) -> Tensor:
        """Rounds values to the dtype, in float32."""
        return values.to(getattr(torch, self.dtype)).float()


@dataclass(frozen=True)
class ExpectedLogits:
    """Logits of one sequence, arrays float32 `[seq, vocab]`.

    reference: without any rounding beyond float32. in_dtype: with weights and activations rounded
    to the engine's dtype. quantized: with all of the engine's rounding.
    """

    reference: Tensor
    in_dtype: Tensor
    quantized: Tensor

    def after(self, position: int) -> ExpectedLogits:
        """Returns the logits at this position and all later ones."""
        parts = (self.reference, self.in_dtype, self.quantized)
        return ExpectedLogits(*(logits[position:] for logits in parts))


def expected_logits(
    folder: Path,
    token_ids: list[int],
    rounding: Rounding,
    adapter: Path | None = None,
    advance: Advance = no_progress,
) -> ExpectedLogits:
    """Computes a checkpoint's logits with and without rounding; each block is read once.

    adapter: folder of a LoRA adapter to merge. advance: counts the blocks.

    Raises MptTrtError when the model has learned positions and the sequence is longer.
    """
    model = open_checkpoint(folder, adapter)
    config, length = model.config, len(token_ids)
    plain, in_dtype = reference_block(config, length), rounding.without_quantization
    with torch.inference_mode():
        runs = [_Run(plain), _Run(_rounded(config, length, in_dtype), in_dtype)]
        if rounding != in_dtype:
            runs.append(_Run(_rounded(config, length, rounding), rounding))
        states = [run.start(model, token_ids) for run in runs]
        for layer in range(config.num_layers):
            tensors = model.tensors(f"blocks.{layer}.")
            states = [
                run.cast(run.block(tensors, state)) for run, state in zip(runs, states, strict=True)
            ]
            advance(1)
        norm, head = last_norm(model), head_of(model)
        logits = [run.end(norm, head, state) for run, state in zip(runs, states, strict=True)]
    return ExpectedLogits(logits[0], logits[1], logits[-1])


@dataclass(frozen=True)
class _Run:
    """A pass through the model. rounding: None for the reference."""

    block: Block
    rounding: Rounding | None = None

    def cast(self, values: Tensor) -> Tensor:
        return values if self.rounding is None else self.rounding.cast(values)

    def start(self, model: ModelTensors, token_ids: list[int]) -> Tensor:
        return embed(model, self._table(model.tensor("wte.weight")), torch.tensor(token_ids))

    def end(self, norm: nn.Module, head: Head, hidden: Tensor) -> Tensor:
        return Head(self._table(head.weight), head.scale).logits(self.cast(norm(hidden)))

    def _table(self, rows: Tensor) -> Tensor:
        """Reads the embedding or the head, with one row per token of the vocabulary."""
        is_integer = self.rounding is not None and self.rounding.quantization.head == "int8"
        return _in_int8(self.cast(rows), -1) if is_integer else self.cast(rows)


def _rounded(config: MptConfig, length: int, rounding: Rounding) -> Block:
    attention_bias = causal_bias(config, length)

    def run(tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
        return rounded_block(config, rounding, tensors)(hidden[None], attention_bias)[0]

    return run


def rounded_block(config: MptConfig, rounding: Rounding, tensors: dict[str, Tensor]) -> PlainBlock:
    """Makes a block that computes in float32, but rounds like an engine.

    tensors: the block's float32 weights, by llm-foundry's names.
    """
    stored = {name: rounding.cast(tensor) for name, tensor in tensors.items()}
    block = with_weights(partial(PlainBlock, config), stored)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            _round_linear(config, rounding, module)
    if rounding.quantization.kv_cache != "auto":
        rounded = _in_int8 if rounding.quantization.kv_cache == "int8" else _in_e4m3
        for cached in (block.attn.key, block.attn.value):
            cached.register_forward_hook(lambda _, __, output: rounded(output, None))
    return block


def _round_linear(config: MptConfig, rounding: Rounding, layer: nn.Linear) -> None:
    product = _product(config, rounding.quantization.scheme, layer.weight)

    def compute(layer: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        output = product(inputs[0])
        return rounding.cast(output if layer.bias is None else output + layer.bias)

    layer.register_forward_hook(compute)


def _product(config: MptConfig, scheme: WeightQuantization | None, weight: Tensor) -> Function:
    """Makes `x W^T` for a weight `[out, in]`, with the scheme's rounding."""
    match scheme:
        case SmoothQuant():
            return lambda inputs: _smoothed(scheme, inputs, weight)
        case Fp8():
            return lambda inputs: _in_e4m3(inputs, None) @ _in_e4m3(weight, None).T
        case WeightOnly(bits, group_size):
            # On FT's grid, the scale is amax / 2^(bits - 1), so the largest weight saturates.
            limit = 1 << (bits - 1)
            matrix = _in_groups(weight, group_size, limit, -limit, limit - 1)
        case Awq(group_size) | Gptq(group_size):
            matrix = _in_groups(weight, group_size or default_group_size(config), 7, -8, 7)
        case Mixed():
            # As if all matrices had the coarsest format, which bounds the error.
            form = scheme.coarsest_format
            limit = (1 << (form.bits - 1)) - 1
            matrix = _in_groups(weight, form.group_size, limit, -limit - 1, limit)
        case _:
            matrix = weight
    return lambda inputs: inputs @ matrix.T


def _smoothed(scheme: SmoothQuant, inputs: Tensor, weight: Tensor) -> Tensor:
    """Makes an int8 product, after the inputs' range has moved to the weights."""
    of_inputs = inputs.abs().flatten(0, -2).amax(0).clamp(min=SMALLEST)
    of_weights = weight.abs().amax(0).clamp(min=SMALLEST)
    factors = of_inputs**scheme.alpha / of_weights ** (1 - scheme.alpha)
    rows = _in_int8(inputs / factors, -1 if scheme.per_token else None)
    return rows @ _in_int8(weight * factors, -1 if scheme.per_channel else None).T


def _in_groups(weight: Tensor, size: int | None, limit: int, low: int, high: int) -> Tensor:
    """Rounds `[out, in]` to integers; `size` input features share the scale amax / limit."""
    groups = weight.unflatten(1, (-1, size or weight.shape[1]))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / limit
    return ((groups / scale).round().clamp(low, high) * scale).flatten(1)


def _in_int8(values: Tensor, dim: int | None) -> Tensor:
    """Rounds to -127 ... 127 with the scale amax / 127, of everything or along one dimension."""
    scale = _amax(values, dim) / 127
    return (values / scale).round() * scale


def _in_e4m3(values: Tensor, dim: int | None) -> Tensor:
    scale = _amax(values, dim) / torch.finfo(E4M3).max
    return (values / scale).to(E4M3).float() * scale


def _amax(values: Tensor, dim: int | None) -> Tensor:
    amax = values.abs().amax() if dim is None else values.abs().amax(dim, keepdim=True)
    return amax.clamp(min=SMALLEST)
