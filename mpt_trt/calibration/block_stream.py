"""Runs samples through a model block by block, keeping their hidden states between blocks.

Memory holds one block and the samples' hidden states, on the CPU or on a GPU, for any model size.
Calibration of a linear layer uses only that layer and the activations of the unquantized model, so
blocks that are calibrated one by one get the same results as inside the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpt_trt.calibration.defaults import BATCH_SIZE
from mpt_trt.calibration.model_source import ModelSource, open_model
from mpt_trt.errors import MptTrtError
from mpt_trt.model.tensors import BlockMatrix
from mpt_trt.model.torch_block import PlainBlock, causal_bias, with_weights
from mpt_trt.model.torch_tensors import ModelTensors, embed
from mpt_trt.quantization.activation_amax import ActivationAmax, LinearAmax
from mpt_trt.quantization.calibrated_weights import KvAmax


@dataclass(frozen=True)
class Computation:
    """Device, type and maximum batch size of the computation of blocks."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int = BATCH_SIZE


@dataclass
class SampleRun:
    """Runs a block on all samples at each call.

    The first call must see the unquantized block, because its outputs are the next block's inputs.
    """

    hidden: list[Tensor]
    attention_bias: Tensor
    outputs: list[Tensor] = field(default_factory=list)

    def __call__(self, block: nn.Module) -> None:
        """Runs the block on all samples."""
        outputs = [block(batch, self.attention_bias) for batch in self.hidden]
        if not self.outputs:
            self.outputs = outputs


Visit = Callable[[int, PlainBlock, SampleRun], None]
"""Receives (layer, block, run), may change the block, and calls run(block) at least once."""


@torch.no_grad()
def stream_blocks(
    source: ModelSource, samples: Tensor, computation: Computation, visit: Visit
) -> None:
    """Calls `visit` for each block in order, with its weights in the computation's type.

    samples: token ids, int64 `[number, seq]`. The block is freed before the next one is read.

    Raises MptTrtError for tokens beyond the vocabulary or the learned positions.
    """
    config = source.config
    _require_known_tokens(samples, config.vocab_size)
    device = torch.device(computation.device)
    model = ModelTensors(config, source.reader, device, computation.dtype)
    size = equal_batch_size(len(samples), computation.batch_size)
    hidden = embed(model, model.tensor("wte.weight"), samples.to(device)).split(size)
    attention_bias = causal_bias(config, samples.shape[1]).to(device, computation.dtype)
    for layer in range(config.num_layers):
        run = SampleRun(list(hidden), attention_bias)
        tensors = model.tensors(f"blocks.{layer}.")
        block = with_weights(partial(PlainBlock, config), tensors)
        visit(layer, block, run)
        # ModelOpt leaves reference cycles in quantized modules, which would keep the weights in
        # memory.
        block.to("meta")
        del block, tensors
        if not run.outputs:
            raise ValueError(f"block {layer} was not run")
        hidden = run.outputs


def equal_batch_size(num_samples: int, at_most: int) -> int:
    """Chooses the largest batch size that divides the samples equally.

    Means over batches are then means over samples.
    """
    return next(size for size in range(at_most, 0, -1) if num_samples % size == 0)


def _require_known_tokens(samples: Tensor, vocab_size: int) -> None:
    if (largest := int(samples.max())) >= vocab_size:
        raise MptTrtError(
            f"token {largest} is beyond the model's vocabulary of {vocab_size}; the tokenizer "
            "belongs to another model"
        )


def not_finite() -> MptTrtError:
    """Makes the error for NaN or Inf among activations or weights."""
    return MptTrtError(
        "calibration met NaN or Inf: values are beyond the type that is computed in, or the "
        "checkpoint is damaged; calibrate in bfloat16 or float32, or check the checkpoint"
    )


def on_host(values: Tensor) -> NDArray[Any]:
    """Copies values from a GPU to page-locked memory, which is faster and reused by PyTorch."""
    if values.device.type == "cpu":
        return values.numpy()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values).numpy()


# --- amax ----------------------------------------------------------------------------------------


class AmaxObserver:
    """Computes the amax of each feature over all batches and tokens that it observes."""

    def __init__(self) -> None:
        self._amax: Tensor | None = None

    def observe(self, values: Tensor) -> None:
        """Includes values `[..., features]`."""
        amax = values.detach().abs().flatten(0, -2).amax(0)
        self._amax = amax if self._amax is None else self._amax.maximum(amax)

    def by_feature(self) -> NDArray[np.float32]:
        """Returns the amax, float32 `[features]`; raises MptTrtError when it is not finite."""
        if self._amax is None:
            raise ValueError("no values were observed")
        amax = self._amax.float().cpu().numpy()
        if not np.isfinite(amax).all():
            raise not_finite()
        return amax


@contextlib.contextmanager
def observed_cache(block: PlainBlock) -> Iterator[Callable[[], KvAmax]]:
    """Observes keys and values of a block's runs; yields a function that returns their amax."""
    attention = block.attn
    with _observed_output(attention.key) as key, _observed_output(attention.value) as value:
        yield lambda: KvAmax(*(float(part.by_feature().max()) for part in (key, value)))


def activation_amax(
    folder: Path,
    samples: Tensor,
    computation: Computation,
    advance: Callable[[], None] = lambda: None,
    adapter: Path | None = None,
) -> ActivationAmax:
    """Computes the amax of inputs and outputs of a model's linear layers over samples.

    folder: in Hugging Face format, or an FT checkpoint. samples: int64 `[number, seq]`. advance is
    called after each block. adapter: folder of a LoRA adapter to merge.
    """
    source = open_model(folder, adapter)
    amax: ActivationAmax = []

    def visit(layer: int, block: PlainBlock, run: SampleRun) -> None:
        modules = linear_modules(block)
        with contextlib.ExitStack() as stack:
            observers = {
                matrix: (
                    stack.enter_context(_observed_input(module)),
                    stack.enter_context(_observed_output(module)),
                )
                for matrix, module in modules.items()
            }
            run(block)
        amax.append(
            {m: LinearAmax(x.by_feature(), y.by_feature()) for m, (x, y) in observers.items()}
        )
        advance()

    stream_blocks(source, samples, computation, visit)
    return amax


def linear_modules(block: nn.Module) -> dict[BlockMatrix, nn.Module]:
    """Finds the linear layers of a block, also after ModelOpt has replaced their class."""
    return {matrix: block.get_submodule(matrix.hf_name) for matrix in BlockMatrix}


@contextlib.contextmanager
def _observed_input(module: nn.Module) -> Iterator[AmaxObserver]:
    observer = AmaxObserver()
    handle = module.register_forward_pre_hook(lambda _, inputs: observer.observe(inputs[0]))
    try:
        yield observer
    finally:
        handle.remove()


@contextlib.contextmanager
def _observed_output(module: nn.Module) -> Iterator[AmaxObserver]:
    observer = AmaxObserver()
    handle = module.register_forward_hook(lambda _module, _inputs, output: observer.observe(output))
    try:
        yield observer
    finally:
        handle.remove()
