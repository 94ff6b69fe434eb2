"""One pass over a model's blocks, with the hidden states of all samples between two of them.

Memory is that of one block and of the samples' hidden states, on the CPU or on a GPU, however large
the model. What calibration asks of a linear layer is local to it and sees the activations of the
unquantized model; so blocks that are calibrated one after the other become what they would become
inside the whole model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpt_trt.calibration.model_source import ModelSource, open_model
from mpt_trt.errors import MptTrtError
from mpt_trt.model.tensors import block_matrices
from mpt_trt.model.torch_block import PlainBlock, causal_bias, with_weights
from mpt_trt.model.torch_tensors import ModelTensors, embed
from mpt_trt.quantization.activation_ranges import ActivationRanges, LinearRanges
from mpt_trt.quantization.calibrated_weights import KvRanges
from mpt_trt.quantization.schemes import CALIBRATION_BATCH_SIZE


@dataclass(frozen=True)
class Computation:
    """Where, in what type and on how many samples at a time (at most) the blocks are computed."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int = CALIBRATION_BATCH_SIZE


@dataclass
class SampleRun:
    """Feeds all samples to a block, as often as it is called.

    The first call must meet the unquantized block: what comes out is what the next block gets.
    """

    hidden: list[Tensor]
    attention_bias: Tensor
    outputs: list[Tensor] = field(default_factory=list)

    def __call__(self, block: nn.Module) -> None:
        found = [block(batch, self.attention_bias) for batch in self.hidden]
        if not self.outputs:
            self.outputs = found


# (layer, block, run): does with the block what it wants, and calls run(block) at least once.
Visit = Callable[[int, PlainBlock, SampleRun], None]


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
        # ModelOpt leaves reference cycles in what it quantized, which would keep the weights.
        block.to("meta")
        del block, tensors
        if not run.outputs:
            raise ValueError(f"block {layer} was not run")
        hidden = run.outputs


def equal_batch_size(num_samples: int, at_most: int) -> int:
    """The largest size of batches that hold the same number of samples each.

    Statistics that are means over batches become means over samples.
    """
    return next(size for size in range(at_most, 0, -1) if num_samples % size == 0)


def _require_known_tokens(samples: Tensor, vocab_size: int) -> None:
    if (largest := int(samples.max())) >= vocab_size:
        raise MptTrtError(
            f"token {largest} is beyond the model's vocabulary of {vocab_size}; the tokenizer "
            "belongs to another model"
        )


def not_finite() -> MptTrtError:
    """The error for NaN or Inf among activations or weights."""
    return MptTrtError(
        "calibration met NaN or Inf: values are beyond the type that is computed in, or the "
        "checkpoint is damaged; calibrate in bfloat16 or float32, or check the checkpoint"
    )


# --- ranges --------------------------------------------------------------------------------------


class AbsoluteMaximum:
    """The largest absolute value of each feature, over all batches and tokens seen."""

    def __init__(self) -> None:
        self._found: Tensor | None = None

    def see(self, values: Tensor) -> None:
        """values: `[..., features]`."""
        largest = values.detach().abs().flatten(0, -2).amax(0)
        self._found = largest if self._found is None else self._found.maximum(largest)

    def by_feature(self) -> NDArray[np.float32]:
        """float32 `[features]`; raises MptTrtError when something seen was not finite."""
        if self._found is None:
            raise ValueError("no values were seen")
        found = self._found.float().cpu().numpy()
        if not np.isfinite(found).all():
            raise not_finite()
        return found


@contextlib.contextmanager
def watched_cache(block: PlainBlock) -> Iterator[Callable[[], KvRanges]]:
    """Within it, runs of the block are watched; yields the function that returns the ranges."""
    attention = block.attn
    with _watched_output(attention.key) as key, _watched_output(attention.value) as value:
        yield lambda: KvRanges(*(float(part.by_feature().max()) for part in (key, value)))


def activation_ranges(
    folder: Path,
    samples: Tensor,
    computation: Computation,
    advance: Callable[[], None] = lambda: None,
) -> ActivationRanges:
    """What enters and leaves the linear layers of a model while it reads samples.

    folder: in Hugging Face format, or an FT checkpoint. samples: int64 `[number, seq]`. advance is
    called after each block.
    """
    source = open_model(folder)
    found: ActivationRanges = []

    def visit(layer: int, block: PlainBlock, run: SampleRun) -> None:
        modules = linear_modules(source, layer, block)
        with contextlib.ExitStack() as stack:
            watched = {
                name: (
                    stack.enter_context(_watched_input(module)),
                    stack.enter_context(_watched_output(module)),
                )
                for name, module in modules.items()
            }
            run(block)
        found.append(
            {n: LinearRanges(x.by_feature(), y.by_feature()) for n, (x, y) in watched.items()}
        )
        advance()

    stream_blocks(source, samples, computation, visit)
    return found


def linear_modules(source: ModelSource, layer: int, block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block by FT name, whatever class they have become."""
    prefix = f"blocks.{layer}."
    return {
        name: block.get_submodule(weight.hf_name.removeprefix(prefix).removesuffix(".weight"))
        for name, weight in block_matrices(source.config, layer).items()
    }


@contextlib.contextmanager
def _watched_input(module: nn.Module) -> Iterator[AbsoluteMaximum]:
    seen = AbsoluteMaximum()
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.see(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def _watched_output(module: nn.Module) -> Iterator[AbsoluteMaximum]:
    seen = AbsoluteMaximum()
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.see(output))
    try:
        yield seen
    finally:
        handle.remove()
