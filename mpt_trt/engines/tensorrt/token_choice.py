"""Layers that choose the most likely token, for greedy decoding without a copy of the logits."""

from __future__ import annotations

from types import ModuleType
from typing import Any

CHOSEN, SUMS = "next_ids", "sum_exp_relative_to_max"
"""Outputs of every plan: int64 and float32, `[num_logits, 1]`."""


def add_token_choice(trt: ModuleType, network: Any) -> None:
    """Adds the most likely token of each row of logits, and a measure of its probability.

    `sum_exp_relative_to_max` is the sum of exp(logit - largest logit) over the vocabulary, which is
    1 / the probability of the most likely token.
    """
    outputs = (network.get_output(index) for index in range(network.num_outputs))
    [logits] = [tensor for tensor in outputs if tensor.name == "logits"]
    last_axis = 1 << 1
    top = network.add_topk(logits, trt.TopKOperation.MAX, 1, last_axis)
    chosen = network.add_cast(top.get_output(1), trt.DataType.INT64).get_output(0)
    subtract, add = trt.ElementWiseOperation.SUB, trt.ReduceOperation.SUM
    distance = network.add_elementwise(logits, top.get_output(0), subtract).get_output(0)
    powers = network.add_unary(distance, trt.UnaryOperation.EXP).get_output(0)
    sums = network.add_reduce(powers, add, last_axis, True).get_output(0)
    for name, tensor in ((CHOSEN, chosen), (SUMS, sums)):
        tensor.name = name
        network.mark_output(tensor)
