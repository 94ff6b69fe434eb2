"""Networks rewritten for a GPU against the network as it is, both on the CPU.

The rewritten network must compute the same logits, cache and most likely tokens. Bounds allow for
another order of float32 sums; they are multiples of the logits' standard deviation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.engines.onnxruntime.cuda.norms import NORMS
from mpt_trt.engines.onnxruntime.cuda.shared_weights import share_weights
from mpt_trt.quantization.schemes import Quantization, WeightOnly
from support.checkpoints import CheckpointSpec
from support.cuda import network_of, require_same
from support.engines import FEATURES, LIMITS, make_ft_checkpoint, make_network


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
    norms = [node for node in steps.graph.node if node.op_type in NORMS.values()]
    assert len(norms) == 2 * spec.num_layers + 1
    # The first norms the embedding, to which only learned positions have been added.
    residuals = [not name.startswith("zeros") for node in norms for name in node.input[1:2]]
    assert residuals == [not spec.alibi] + [True] * (2 * spec.num_layers)
    assert count(steps, *NORMS) == 0


WIDE = CheckpointSpec(hidden_size=256, num_heads=4, num_layers=2, vocab_size=301)


@pytest.mark.parametrize("scheme", [None, WeightOnly(4, 64), WeightOnly(4), WeightOnly(8)])
def test_weights_become_inputs(scheme, tmp_path):
    checkpoint = make_ft_checkpoint(tmp_path, WIDE)
    calibrated = CalibratedQuantization(Quantization(scheme, "auto"), None)
    folder = make_network(checkpoint, tmp_path / "network", LIMITS, calibrated)
    num_shared, steps = require_same(folder, checkpoint.config.vocab_size)
    num_matrices = 4 * WIDE.num_layers
    if scheme is None:
        # All matrices of a layer except attention.dense are large enough, and so is the embedding.
        assert num_shared == 4 * WIDE.num_layers + 1
    else:
        assert num_shared == 2 * num_matrices + 1
        assert count(steps, "MatMulNBits") == num_matrices
        assert count(steps, "DequantizeLinear") == 0
    stored = {tensor.name for tensor in steps.graph.initializer}
    assert not stored & {value.name for value in steps.graph.input}


def integer_network(folder: Path, scheme: WeightOnly, spec: CheckpointSpec = WIDE) -> Path:
    checkpoint = make_ft_checkpoint(folder, spec, "float16")
    calibrated = CalibratedQuantization(Quantization(scheme, "auto"), None)
    return make_network(checkpoint, folder / "network", LIMITS, calibrated)


def stored_integers(network: onnx.ModelProto, folder: Path, name: str) -> NDArray[np.uint8]:
    """A matrix of the network, `[in_features, out_features]`, unsigned: 8, or 128, is 0."""
    [tensor] = [each for each in network.graph.initializer if each.name == name]
    place = {entry.key: entry.value for entry in tensor.external_data}
    stored = np.fromfile(folder / place["location"], np.int8)
    if tensor.data_type == onnx.TensorProto.INT8:
        return (stored.astype(np.int16) + 128).astype(np.uint8).reshape(tensor.dims)
    # The lower half of a byte comes first; both are two's complement.
    stored = np.stack([stored << 4 >> 4, stored >> 4], axis=-1)
    return (stored + 8).astype(np.uint8).reshape(tensor.dims)


MATRIX = "layers.1.mlp.dense_4h_to_h.weight.quantized"


@pytest.mark.parametrize("bits", [4, 8])
def test_column_layout_of_integers(bits, tmp_path):
    """Read back from MatMulNBits' layout, and from the network's own."""
    folder = integer_network(tmp_path, WeightOnly(bits))
    network = network_of(folder)
    expected = stored_integers(network, folder, MATRIX)
    [weight] = [each for each in share_weights(network, folder).inputs if each.name == MATRIX]
    columns = weight.read().reshape(expected.shape[1], -1)
    if bits == 4:
        columns = np.stack([columns & 15, columns >> 4], axis=-1).reshape(expected.T.shape)
    np.testing.assert_array_equal(columns.T, expected)


# FasterTransformer's permutations of rows, by bits.
PERMUTATIONS = {
    4: [a + b + c for a in (0, 2, 4, 6) for b in (0, 8, 16, 24) for c in (0, 1)],
    8: [a + b + c for a in (0, 2, 4, 6) for b in (0, 8) for c in (0, 1)],
}
# Of the elements of 32 bits, which come in the places of 0, 1, ...
IN_A_REGISTER = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}


def preprocessed(matrix: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """FasterTransformer's preprocess_weights_for_mixed_gemm, step by step, for capability 8."""
    height, width = matrix.shape
    permutation = PERMUTATIONS[bits]
    size, together = len(permutation), 16 // bits
    rows = [start + k for start in range(0, height, size) for k in permutation]
    columns = matrix[rows].T
    interleaved = np.empty((width // together, height * together), np.uint8)
    for column in range(width):
        for tile in range(height // 64):
            start = 64 * (tile * together + column % together)
            part = columns[column, 64 * tile : 64 * (tile + 1)]
            interleaved[column // together, start : start + 64] = part
    registers = interleaved.reshape(-1, 32 // bits)[:, IN_A_REGISTER[bits]]
    if bits == 8:
        return registers.ravel()
    return (registers[:, 0::2] | (registers[:, 1::2] << 4)).ravel()


@pytest.mark.parametrize("scheme", [WeightOnly(4, 64), WeightOnly(4), WeightOnly(8)])
def test_prepacked_layout_of_integers(scheme, tmp_path):
    folder = integer_network(tmp_path, scheme)
    network = network_of(folder)
    expected = preprocessed(stored_integers(network, folder, MATRIX), scheme.bits)
    shared = share_weights(network, folder, (scheme.bits,))
    [weight] = [each for each in shared.inputs if each.name == MATRIX]
    np.testing.assert_array_equal(weight.read().ravel(), expected)
    # Scales of 32 rows each; constants, which the network names.
    columns = share_weights(network_of(folder), folder).inputs
    [scales] = [each for each in columns if each.name == MATRIX.replace("quantized", "scale")]
    [finer] = [each for each in shared.constants if each.name == scales.name]
    assert finer.shape[1] * 32 == WIDE.hidden_size * 4
    repeated = np.repeat(scales.read(), finer.shape[1] // scales.shape[1], axis=1)
    np.testing.assert_array_equal(finer.read(), repeated)
    assert {each.name for each in shared.constants} <= {
        tensor.name for tensor in network.graph.initializer
    }


def test_networks_that_cannot_be_prepacked_keep_the_column_layout(tmp_path):
    narrow = CheckpointSpec(hidden_size=96, num_heads=6, num_layers=1, vocab_size=301)
    folder = integer_network(tmp_path, WeightOnly(4, 32), narrow)
    assert share_weights(network_of(folder), folder, (4, 8)).constants == []
