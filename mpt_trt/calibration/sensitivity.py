"""Divergence of the model when one of its matrices is stored in another format.

All variants of the model run side by side, one block after the other: a variant begins at the block
whose matrix it changes. Memory holds one block and a few hidden states of each variant. Matrices
are rounded for all samples, as they will be, but the divergence is measured on a part of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mpt_trt.calibration.block_stream import (
    Computation,
    SampleRun,
    linear_modules,
    stream_blocks,
)
from mpt_trt.calibration.gptq import Inputs, rounded_to
from mpt_trt.calibration.model_source import ModelSource
from mpt_trt.model.tensors import BlockMatrix
from mpt_trt.model.torch_block import PlainBlock, model_norm, with_weights
from mpt_trt.model.torch_tensors import ModelTensors
from mpt_trt.quantization.gptq import Statistics
from mpt_trt.quantization.mixed import Candidate, choose_formats, matrix_bits, require_budget
from mpt_trt.quantization.schemes import MIXED_STRIDE, IntegerFormat, mixed_candidates

Formats = list[dict[BlockMatrix, IntegerFormat]]
"""Candidates or choices by layer and matrix."""


def measured_formats(
    source: ModelSource,
    samples: Tensor,
    computation: Computation,
    bits: float,
    advance: Callable[[], None] = lambda: None,
) -> Formats:
    """Chooses the format of each matrix by measured divergence, within `bits` per weight.

    samples: token ids `[samples, seq]`.

    Raises MptTrtError when the budget is too small.
    """
    config = source.config
    require_budget(config, bits)
    shapes = {matrix: matrix.shape(config) for matrix in BlockMatrix}
    num_weights = config.num_layers * sum(out * width for out, width in shapes.values())
    formats = mixed_candidates(config)
    divergence = _Measurement(source, computation, formats).run(samples, advance)
    candidates = {
        (layer, matrix): [
            Candidate(each, matrix_bits(each, *shapes[matrix]), divergence[layer, matrix, each])
            for each in formats
        ]
        for layer in range(config.num_layers)
        for matrix in shapes
    }
    chosen = choose_formats(candidates, num_weights, bits)
    return [
        {matrix: chosen[layer, matrix] for matrix in BlockMatrix}
        for layer in range(config.num_layers)
    ]


Variant = tuple[int, BlockMatrix, IntegerFormat]


@dataclass
class _Measurement:
    source: ModelSource
    computation: Computation
    formats: Sequence[IntegerFormat]

    def run(self, samples: Tensor, advance: Callable[[], None]) -> dict[Variant, float]:
        """Measures each variant's mean KL divergence from the unchanged model; nats per token."""
        hidden: dict[Variant, list[Tensor]] = {}
        plain: list[Tensor] = []

        def visit(layer: int, block: PlainBlock, run: SampleRun) -> None:
            with contextlib.ExitStack() as stack:
                modules = linear_modules(block)
                inputs = {name: stack.enter_context(Inputs(m)) for name, m in modules.items()}
                run(block)
            for variant, states in hidden.items():
                hidden[variant] = [block(state, run.attention_bias) for state in states]
            measured = [batch[::MIXED_STRIDE] for batch in run.hidden]
            for name, module in modules.items():
                hessian = _hessian(inputs.pop(name).batches)
                for each in self.formats:
                    with _rounded(module, hessian, each):
                        states = [block(batch, run.attention_bias) for batch in measured]
                    hidden[layer, name, each] = states
            plain[:] = [batch[::MIXED_STRIDE] for batch in run.outputs]
            advance()

        stream_blocks(self.source, samples, self.computation, visit)
        return self._divergences(plain, hidden)

    @torch.no_grad()
    def _divergences(
        self, plain: list[Tensor], hidden: dict[Variant, list[Tensor]]
    ) -> dict[Variant, float]:
        config, device = self.source.config, torch.device(self.computation.device)
        model = ModelTensors(config, self.source.reader, device, self.computation.dtype)
        norm = with_weights(partial(model_norm, config), model.tensors("norm_f."))
        head = model.tensor("wte.weight" if config.tie_word_embeddings else "lm_head.weight")

        def log_probabilities(states: Tensor) -> Tensor:
            logits: Tensor = (norm(states) @ head.T).float() * config.logit_scale
            return logits.log_softmax(-1)

        totals = dict.fromkeys(hidden, 0.0)
        tokens = sum(batch.shape[0] * batch.shape[1] for batch in plain)
        for batch, states in enumerate(plain):
            for row, sequence in enumerate(states):
                expected = log_probabilities(sequence)
                for variant, batches in hidden.items():
                    found = log_probabilities(batches[batch][row])
                    totals[variant] += float((expected.exp() * (expected - found)).sum())
        return {variant: total / tokens for variant, total in totals.items()}


def _hessian(batches: list[Tensor]) -> Tensor:
    statistics = Statistics.empty(batches[0].shape[1], batches[0].device)
    for batch in batches:
        statistics.add(batch, batch)
    return statistics.hessian


@contextlib.contextmanager
def _rounded(module: nn.Module, hessian: Tensor, each: IntegerFormat) -> Iterator[None]:
    """Gives a module rounded weights for a while."""
    weight = module.get_parameter("weight")
    # Rounding overwrites them. The inputs have no errors.
    statistics = Statistics(hessian.clone(), torch.zeros_like(hessian, dtype=torch.float32))
    kept = weight.clone()
    weight.copy_(rounded_to(each, weight.float(), statistics)[0])
    try:
        yield
    finally:
        weight.copy_(kept)
