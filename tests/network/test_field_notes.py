"""Networks avoid what public reports name as wrong in TensorRT 11; see docs/engine_format.md."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch

from engines.test_quantized_engines import QUANTIZATIONS, Model
from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED, CalibratedQuantization
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.sharding import VocabularySharding, all_ranks
from mpt_trt.network.decoder import build_network
from mpt_trt.quantization.schemes import Quantization
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.engines import FEATURES

PRODUCTS = ("MatMul", "Gemm", "MatMulInteger")
# Nodes between a value and its product in quantized networks.
BETWEEN = ("Cast", "Clip", "DequantizeLinear", "Div", "Mul", "QuantizeLinear", "Round")
EVERYTHING = CheckpointSpec(
    hidden_size=64, num_heads=8, num_kv_heads=2, num_layers=2, qk_ln=True, no_bias=False
)
BOTH = VocabularySharding(embedding=True, head=True)
QUERY, KEY, VALUE, BIAS = range(4)


def graphs(
    checkpoint: FtCheckpoint, calibrated: CalibratedQuantization = NOT_QUANTIZED
) -> list[onnx.GraphProto]:
    """Graphs of all ranks."""
    ranks = all_ranks(checkpoint.tp_size)
    return [build_network(checkpoint, rank, 32, BOTH, calibrated).model.graph for rank in ranks]


def model_of(spec: CheckpointSpec, folder: Path) -> Model:
    samples = torch.randint(spec.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    return Model(write_checkpoint(folder / "hf", spec), folder, samples, group_size=16)


def factors(graph: onnx.GraphProto) -> Counter[str]:
    """Counts the products that multiply each value by a weight."""
    stored = {tensor.name for tensor in graph.initializer}
    sources = {output: node for node in graph.node for output in node.output}

    def origin(name: str) -> str | None:
        """Finds the value before roundings and scales; None for results of weights only."""
        node = sources.get(name)
        if name in stored:
            return None
        if node is None or node.op_type not in BETWEEN:
            return name
        origins = [origin(value) for value in node.input]
        return next((found for found in origins if found is not None), None)

    read = [
        [origin(name) for name in node.input[:2]] for node in graph.node if node.op_type in PRODUCTS
    ]
    # The products of values with values, within attention, are one operator here.
    return Counter(next(name for name in pair if name is not None) for pair in read)


def require_no_siblings(graph: onnx.GraphProto, num_layers: int) -> None:
    found = factors(graph)
    # QKV, output, up and down in each layer, and the head.
    assert sum(found.values()) == 4 * num_layers + 1
    assert set(found.values()) == {1}, found


@pytest.mark.parametrize("name", FEATURES)
def test_no_two_products_share_an_input(name, tmp_path):
    spec = FEATURES[name]
    for graph in graphs(model_of(spec, tmp_path).checkpoint(Quantization(), 1, "float16")):
        require_no_siblings(graph, spec.num_layers)


@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_no_two_products_of_a_rank_share_an_input(tp_size, tmp_path):
    """This also holds if key and value heads are on several ranks."""
    checkpoint = model_of(EVERYTHING, tmp_path).checkpoint(Quantization(), tp_size, "float16")
    for graph in graphs(checkpoint):
        require_no_siblings(graph, EVERYTHING.num_layers)


@pytest.mark.parametrize("name", ["int4_weight_only", "int4_awq", "sq", "sq per tensor", "fp8"])
def test_no_two_quantized_products_share_an_input(name, tmp_path):
    spec = CheckpointSpec(hidden_size=64, num_heads=4, num_kv_heads=2, num_layers=1)
    model, quantization = model_of(spec, tmp_path), QUANTIZATIONS[name]
    checkpoint = model.checkpoint(quantization, 1, "float16")
    for graph in graphs(checkpoint, model.calibrated(quantization, checkpoint)):
        require_no_siblings(graph, spec.num_layers)


@pytest.mark.parametrize("name", ["multi-head", "grouped-query", "learned positions", "everything"])
def test_attention_has_an_explicit_bias_and_no_lengths(name, tmp_path):
    spec = FEATURES[name]
    graph = graphs(model_of(spec, tmp_path).checkpoint(Quantization(), 1, "float16"))[0]
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    assert len(attentions) == spec.num_layers
    # One bias for all layers; neither a past nor nonpad_kv_seqlen follows it.
    assert len({node.input[BIAS] for node in attentions}) == 1
    assert {len(node.input) for node in attentions} == {BIAS + 1}
    for node in attentions:
        assert not any(
            attribute.name == "is_causal" and attribute.i for attribute in node.attribute
        )
