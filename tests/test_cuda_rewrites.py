"""What a network becomes for a GPU, against the network as it is, both on the CPU.

The rewritten network must compute the same: logits, cache, likeliest tokens. Bounds are those of
another order of sums (float32), in multiples of the logits' standard deviation.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from checkpoints import CheckpointSpec
from cuda_support import network_of, require_same
from engines_support import FEATURES, LIMITS, make_ft_checkpoint, make_network
from mpt_trt.engines import cuda_rewrites
from mpt_trt.engines.shared_weights import share_weights
from mpt_trt.quantization.recipe import Recipe
from mpt_trt.quantization.scheme import Quantization, WeightOnly

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", FEATURES)
def test_a_rewritten_network_computes_the_same(name, tmp_path):
    checkpoint = make_ft_checkpoint(tmp_path, FEATURES[name])
    _, steps = require_same(
        make_network(checkpoint, tmp_path / "network"), checkpoint.config.vocab_size
    )
    config = checkpoint.config
    operators = {node.op_type for node in steps.graph.node}
    assert not operators & {"Attention", "Transpose", "GatherND", "Shape"}
    is_fused = config.num_kv_heads == config.num_heads
    assert count(steps, "MultiHeadAttention") == (config.num_layers if is_fused else 0)


def count(model: onnx.ModelProto, *op_types: str) -> int:
    return sum(node.op_type in op_types for node in model.graph.node)


@pytest.mark.parametrize("name", ["multi-head", "rmsnorm", "grouped-query", "learned positions"])
def test_norms_take_in_the_residual(name, tmp_path):
    spec = FEATURES[name]
    checkpoint = make_ft_checkpoint(tmp_path, spec)
    _, steps = require_same(
        make_network(checkpoint, tmp_path / "network"), checkpoint.config.vocab_size
    )
    norms = [node for node in steps.graph.node if node.op_type in cuda_rewrites.NORMS.values()]
    assert len(norms) == 2 * spec.num_layers + 1
    # The first norms the embedding, to which only learned positions have been added.
    residuals = [not name.startswith("zeros") for node in norms for name in node.input[1:2]]
    assert residuals == [not spec.alibi] + [True] * (2 * spec.num_layers)
    assert count(steps, *cuda_rewrites.NORMS) == 0


WIDE = CheckpointSpec(hidden_size=256, num_heads=4, num_layers=2, vocab_size=301)


@pytest.mark.parametrize("scheme", [None, WeightOnly(4, 64), WeightOnly(4), WeightOnly(8)])
def test_weights_become_inputs(scheme, tmp_path):
    checkpoint = make_ft_checkpoint(tmp_path, WIDE)
    recipe = Recipe(Quantization(scheme, "auto"), None)
    folder = make_network(checkpoint, tmp_path / "network", LIMITS, recipe)
    num_shared, steps = require_same(folder, checkpoint.config.vocab_size)
    num_matrices = 4 * WIDE.num_layers
    if scheme is None:
        # Of a layer, all but attention.dense are large enough; and the embedding.
        assert num_shared == 4 * WIDE.num_layers + 1
    else:
        assert num_shared == 2 * num_matrices + 1
        assert count(steps, "MatMulNBits") == num_matrices
        assert count(steps, "DequantizeLinear") == 0
    stored = {tensor.name for tensor in steps.graph.initializer}
    assert not stored & {value.name for value in steps.graph.input}


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_of_a_product_are_those_that_are_stored(bits, tmp_path):
    """Read back from MatMulNBits' layout, and from the network's own."""
    checkpoint = make_ft_checkpoint(tmp_path, WIDE)
    recipe = Recipe(Quantization(WeightOnly(bits), "auto"), None)
    folder = make_network(checkpoint, tmp_path / "network", LIMITS, recipe)
    name = "layers.1.mlp.dense_4h_to_h.weight.quantized"
    network = network_of(folder)
    [tensor] = [each for each in network.graph.initializer if each.name == name]
    height, width = tensor.dims
    place = {entry.key: entry.value for entry in tensor.external_data}
    stored = np.fromfile(folder / place["location"], np.int8)
    if bits == 4:
        # The lower half of a byte comes first; both are two's complement.
        stored = np.stack([stored << 4 >> 4, stored >> 4], axis=-1)
    expected = stored.reshape(height, width)
    [weight] = [each for each in share_weights(network, folder) if each.name == name]
    columns = weight.read().reshape(width, -1)
    if bits == 4:
        columns = np.stack([columns & 15, columns >> 4], axis=-1).reshape(width, height)
    found = columns.astype(np.int16) - (8 if bits == 4 else 128)
    np.testing.assert_array_equal(found.T, expected)
