"""What a network becomes for a GPU, against the network as it is, both on the CPU.

The rewritten network must compute the same: logits, cache, likeliest tokens. Bounds are those of
another order of sums (float32), in multiples of the logits' standard deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper

from checkpoints import CheckpointSpec
from engines_support import FEATURES, LIMITS, make_ft_checkpoint, make_network
from mpt_trt.engines import cuda_rewrites
from mpt_trt.engines.manifest import network_name
from mpt_trt.engines.onnx_rewrites import spell_out_scale_types
from mpt_trt.engines.shared_weights import SharedWeight, share_weights
from mpt_trt.ft_checkpoint import FtCheckpoint
from mpt_trt.quantization.recipe import Recipe
from mpt_trt.quantization.scheme import Quantization, WeightOnly

BOUND = 2e-5
# Rows of different lengths, one of a single token.
LENGTHS = np.array([5, 1, 9])
BATCH = len(LENGTHS)
FLOAT = onnx.TensorProto.FLOAT

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Loaded:
    """A session with the weights that it takes as inputs, by name."""

    session: onnxruntime.InferenceSession
    weights: dict[str, onnxruntime.OrtValue]

    def run(self, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(v) for name, v in feeds.items()}
        names = [output.name for output in self.session.get_outputs()]
        found = self.session.run_with_ort_values(names, values | self.weights)
        return {name: value.numpy() for name, value in zip(names, found, strict=True)}


def load(model: onnx.ModelProto, folder: Path, weights: list[SharedWeight]) -> Loaded:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    entries = {
        "session.model_external_initializers_file_folder_path": str(folder),
        "session.qdq_matmulnbits_accuracy_level": "1",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return Loaded(session, {weight.name: as_value(weight) for weight in weights})


def as_value(weight: SharedWeight) -> onnxruntime.OrtValue:
    dtype = helper.tensor_dtype_to_np_dtype(weight.element_type)
    content = weight.read().reshape(-1).view(dtype).reshape(weight.shape)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(content, weight.element_type)


def network_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / network_name(0), load_external_data=False)


def empty_cache(model: onnx.ModelProto) -> dict[str, NDArray]:
    caches = [value for value in model.graph.input if value.name.startswith("past_")]
    return {
        value.name: np.zeros(
            (BATCH, *(d.dim_value for d in value.type.tensor_type.shape.dim[1:])),
            helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
        )
        for value in caches
    }


def as_past(outputs: dict[str, NDArray]) -> dict[str, NDArray]:
    kept = {name: value for name, value in outputs.items() if name.startswith("present_")}
    return {name.replace("present_", "past_"): value for name, value in kept.items()}


def prompt_feeds(vocab_size: int) -> dict[str, NDArray]:
    ids = np.random.default_rng(0).integers(0, vocab_size, (BATCH, LENGTHS.max()))
    return {
        "input_ids": ids,
        "write_positions": np.zeros(BATCH, np.int64),
        "logit_positions": np.stack([np.arange(BATCH), LENGTHS - 1], axis=1),
    }


def step_feeds(vocab_size: int) -> dict[str, NDArray]:
    ids = np.random.default_rng(1).integers(0, vocab_size, (BATCH, 1))
    return {"input_ids": ids, "write_positions": LENGTHS.astype(np.int64)}


def require_equal(checkpoint: FtCheckpoint, folder: Path) -> tuple[int, onnx.ModelProto]:
    """A prompt and a step of the network in `folder`, as it is and rewritten.

    Returns the number of weights that became inputs, and the network for steps.
    """
    original, shared = network_of(folder), network_of(folder)
    weights = share_weights(shared, folder)
    reading, steps = cuda_rewrites.for_prompts(shared), cuda_rewrites.for_steps(shared)
    if any(tensor.data_type == onnx.TensorProto.INT4 for tensor in original.graph.initializer):
        spell_out_scale_types(original, FLOAT)
    plain = load(original, folder, [])
    prompts, single = load(reading, folder, weights), load(steps, folder, weights)
    vocab_size = checkpoint.config.vocab_size
    feeds = prompt_feeds(vocab_size) | empty_cache(original)
    expected = plain.run(feeds)
    chosen = feeds.pop("logit_positions")
    own = {"logit_rows": chosen @ [LENGTHS.max(), 1], "key_length": LENGTHS.max(keepdims=True)}
    found = prompts.run(feeds | own)
    require_close(expected, found)
    feeds = step_feeds(vocab_size)
    every_row = np.stack([np.arange(BATCH), np.zeros(BATCH, np.int64)], axis=1)
    past = as_past(expected)
    expected = plain.run(feeds | past | {"logit_positions": every_row})
    found = single.run(feeds | past)
    require_close(expected, found)
    logits = found["logits"].astype(np.float64)
    assert found["next_ids"].ravel().tolist() == logits.argmax(axis=-1).tolist()
    likelihood = logits.max(axis=-1) - np.log(np.exp(logits).sum(axis=-1))
    np.testing.assert_allclose(-np.log(found["total_odds"].ravel()), likelihood, atol=1e-5)
    assert found["next_positions"].tolist() == (LENGTHS + 1).tolist()
    return len(weights), steps


def require_close(expected: dict[str, NDArray], found: dict[str, NDArray]) -> None:
    bound = BOUND * expected["logits"].std()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=bound, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", FEATURES)
def test_a_rewritten_network_computes_the_same(name, tmp_path):
    checkpoint = make_ft_checkpoint(tmp_path, FEATURES[name])
    _, steps = require_equal(checkpoint, make_network(checkpoint, tmp_path / "network"))
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
    _, steps = require_equal(checkpoint, make_network(checkpoint, tmp_path / "network"))
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
    num_shared, steps = require_equal(checkpoint, folder)
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
