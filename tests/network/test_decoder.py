"""The network against the plain model of plain_mpt.py, and facts about the graph itself.

It runs under ONNX Runtime as users run it without a GPU, and once under ONNX's own reference
evaluator, so that what holds is a property of the graph and not of one runtime.

Bounds are multiples of the logits' standard deviation (about 1.5). float32: the order of sums is
all that may differ, and 48 to 240 terms of 2^-24 relative error give some 1e-6. float16: every
result is rounded to 11 bits (2^-11 = 5e-4 relative) and values reach 5; ten of these roundings lie
on the way through two layers (measured: 0.003 to 0.008).
bfloat16 has 8 bits, so 8 times that where the arithmetic itself is bfloat16.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from mpt_trt.engines.onnxruntime.cpu_engine import OnnxRuntimeEngine
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Rank
from mpt_trt.network.decoder import build_network
from mpt_trt.network.graph import WEIGHTS_FOLDER
from support.checkpoints import CheckpointSpec
from support.engines import (
    FEATURES,
    LIMITS,
    deviation,
    every_position,
    feed,
    make_ft_checkpoint,
    make_network,
    open_network,
    open_spec,
    random_ids,
    reference,
    step,
    tree,
)

FLOAT32_BOUND = 2e-5
FLOAT16_BOUND = 1.5e-2
BFLOAT16_BOUND = 0.15

NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# The four ways in which a position can enter, with as many kinds of heads.
POSITIONAL = {
    "ALiBi, 6 heads": CheckpointSpec(num_heads=6),
    "ALiBi, grouped-query": CheckpointSpec(num_heads=8, num_kv_heads=2),
    "learned": CheckpointSpec(alibi=False, num_kv_heads=1),
    "rope, grouped-query": CheckpointSpec(num_heads=8, num_kv_heads=2, rope={"rope_theta": 50}),
}


@dataclass(frozen=True)
class Made:
    """A network's folder, and the checkpoint that it was made from; not to be changed."""

    checkpoint: FtCheckpoint
    network: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[..., Made]:
    """A function that makes the network of a spec and a storage type, once each."""

    @cache
    def make(spec: CheckpointSpec, storage_type: str = "float32") -> Made:
        folder = tmp_path_factory.mktemp("made")
        checkpoint = make_ft_checkpoint(folder, spec, storage_type)
        return Made(checkpoint, make_network(checkpoint, folder / "network"))

    return make


@pytest.fixture(scope="module", params=POSITIONAL)
def model(request, tmp_path_factory) -> tuple[CheckpointSpec, OnnxRuntimeEngine]:
    """A spec and its network; every test starts the cache anew."""
    spec = POSITIONAL[request.param]
    return spec, open_spec(tmp_path_factory.mktemp("model"), spec)


# --- numerics of every feature -------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURES)
def test_prefill_and_decode_equal_the_plain_model(name, made):
    spec = FEATURES[name]
    ids = random_ids(spec, rows=2, length=13)
    found = feed(open_network(made(spec).network), ids, [8, 1, 1, 1, 1, 1])
    assert found.dtype == np.float32
    assert deviation(found, reference(spec, ids)) < FLOAT32_BOUND


@pytest.mark.parametrize("name", FEATURES)
def test_float16_stays_within_its_rounding(name, made):
    spec = FEATURES[name]
    ids = random_ids(spec, rows=2, length=13)
    found = feed(open_network(made(spec, "float16").network), ids, [8, 1, 1, 1, 1, 1])
    error = deviation(found, reference(spec, ids, "float16"))
    assert FLOAT32_BOUND < error < FLOAT16_BOUND, "below: this was not computed in float16"


@pytest.mark.parametrize("name", FEATURES)
def test_bfloat16_runs_in_float32_arithmetic_on_a_cpu(name, made):
    """The weights are rounded to bfloat16, and nothing else is."""
    spec = FEATURES[name]
    ids = random_ids(spec, rows=2, length=13)
    found = feed(open_network(made(spec, "bfloat16").network), ids, [8, 1, 1, 1, 1, 1])
    assert deviation(found, reference(spec, ids, "bfloat16")) < FLOAT32_BOUND
    assert deviation(found, reference(spec, ids)) > 100 * FLOAT32_BOUND, "weights are not rounded"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("alibi_bias_max", "alibi_bias_max"),
        ("clip_qkv", "clip_qkv"),
        ("softmax_scale", "softmax_scale"),
        ("logit_scale", "logit_scale"),
        ("epsilon", "layer_norm_epsilon"),
        ("epsilon of rmsnorm", "layer_norm_epsilon"),
    ],
)
def test_settings_without_weights_are_visible_in_the_logits(name, field):
    """A network that ignored one would fail above: the reference moves by far more than allowed."""
    spec = FEATURES[name]
    without = replace(spec, **{field: getattr(CheckpointSpec(), field)})
    ids = random_ids(spec, rows=2, length=13)
    assert deviation(reference(without, ids), reference(spec, ids)) > 5 * FLOAT16_BOUND


@pytest.mark.parametrize(
    ("storage_type", "bound"),
    [("float32", FLOAT32_BOUND), ("float16", FLOAT16_BOUND), ("bfloat16", BFLOAT16_BOUND)],
)
@pytest.mark.parametrize(
    "name", ["multi-head", "everything", "learned positions", "rmsnorm", "rope"]
)
def test_reference_evaluator_of_onnx_computes_the_same(name, storage_type, bound, made, tmp_path):
    """The operators as the standard defines them, by an implementation that is not a runtime's."""
    spec = FEATURES[name]
    network = copied(made(spec, storage_type).network, tmp_path / "copy")
    evaluator = ReferenceEvaluator(onnx.load(network / "rank0.onnx"))
    ids = random_ids(spec, rows=2, length=9)
    found = evaluate(evaluator, spec, ids, [7, 1, 1], NUMPY_TYPES[storage_type])
    assert deviation(found, reference(spec, ids, storage_type)) < bound


def evaluate(evaluator, spec, ids, pieces, dtype) -> np.ndarray:
    """`engines_support.feed` for a ReferenceEvaluator, the cache being passed around by hand."""
    rows = len(ids)
    kv_heads = spec.num_kv_heads or spec.num_heads
    shape = (rows, kv_heads, LIMITS.cache_len, spec.head_dim)
    cache = {
        f"past_{kind}.{layer}": np.zeros(shape, dtype)
        for layer in range(spec.num_layers)
        for kind in ("key", "value")
    }
    found, start = [], 0
    for size in pieces:
        feeds = {
            "input_ids": ids[:, start : start + size],
            "write_positions": np.full(rows, start),
            "logit_positions": every_position(rows, size),
        }
        results = dict(zip(evaluator.output_names, evaluator.run(None, feeds | cache), strict=True))
        found.append(results.pop("logits").reshape(rows, size, -1))
        cache = {name.replace("present_", "past_"): value for name, value in results.items()}
        start += size
    return np.concatenate(found, axis=1)


# --- the step contract ---------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[14], [1] * 14, [3, 3, 3, 3, 2], [13, 1], [1, 13]])
def test_chunked_prefill_gives_the_same_logits(model, pieces):
    spec, engine = model
    ids = random_ids(spec, rows=3, length=14)
    assert deviation(feed(engine, ids, pieces), reference(spec, ids)) < FLOAT32_BOUND


def test_one_token_in_one_row(model):
    spec, engine = model
    ids = random_ids(spec, rows=1, length=1)
    assert deviation(feed(engine, ids, [1]), reference(spec, ids)) < FLOAT32_BOUND


@pytest.mark.parametrize("padding_seed", [1, 2])
def test_padding_of_ragged_rows_does_not_matter(model, padding_seed):
    """Rows of 3, 9 and 6 tokens, prefilled together, then decoded each from its own end."""
    spec, engine = model
    lengths, decoded = np.array([3, 9, 6]), 5
    ids = random_ids(spec, rows=3, length=9 + decoded)
    expected = reference(spec, ids)
    padding = random_ids(spec, rows=3, length=9, seed=padding_seed)
    prompt = np.where(np.arange(9) < lengths[:, None], ids[:, :9], padding)

    engine.start(3)
    prefilled = step(engine, prompt, [0, 0, 0])
    for row, length in enumerate(lengths):
        assert deviation(prefilled[row, :length], expected[row, :length]) < FLOAT32_BOUND
    rows = np.arange(3)
    for offset in range(decoded):
        position = lengths + offset
        found = step(engine, ids[rows, position][:, None], position)[:, 0]
        assert deviation(found, expected[rows, position]) < FLOAT32_BOUND


def test_rows_continue_at_different_positions_in_one_step(model):
    """Pieces of four tokens, one after a prefix of 2 tokens and one after a prefix of 10."""
    spec, engine = model
    ids = random_ids(spec, rows=2, length=14)
    expected = reference(spec, ids)
    engine.start(2)
    step(engine, ids[:, :10], [0, 0])  # row 0 keeps 2 of these, the others are overwritten
    found = step(engine, np.stack([ids[0, 2:6], ids[1, 10:14]]), [2, 10])
    assert deviation(found[0], expected[0, 2:6]) < FLOAT32_BOUND
    assert deviation(found[1], expected[1, 10:14]) < FLOAT32_BOUND


def test_cache_is_used_up_to_its_last_position(model):
    spec, engine = model
    ids = random_ids(spec, rows=2, length=LIMITS.cache_len)
    pieces = [LIMITS.max_input_len, LIMITS.max_output_len - 1, 1]
    assert deviation(feed(engine, ids, pieces), reference(spec, ids)) < FLOAT32_BOUND


def test_logits_come_for_the_positions_asked_for_in_that_order(model):
    spec, engine = model
    ids = random_ids(spec, rows=3, length=7)
    expected = reference(spec, ids)
    wanted = np.array([(2, 6), (0, 0), (1, 3), (2, 6), (1, 2)])
    engine.start(3)
    found = engine.step(ids, np.zeros(3, np.int64), wanted)
    assert found.shape == (5, spec.vocab_size)
    assert deviation(found, expected[tuple(wanted.T)]) < FLOAT32_BOUND


def test_step_without_logits_still_fills_the_cache(model):
    spec, engine = model
    ids = random_ids(spec, rows=2, length=8)
    engine.start(2)
    nothing = engine.step(ids[:, :5], np.zeros(2, np.int64), np.empty((0, 2), np.int64))
    assert nothing.shape == (0, spec.vocab_size) and nothing.dtype == np.float32
    found = step(engine, ids[:, 5:], [5, 5])
    assert deviation(found, reference(spec, ids)[:, 5:]) < FLOAT32_BOUND


def test_start_forgets_what_was_before(model):
    """The number of rows may change as well."""
    spec, engine = model
    for seed, rows in enumerate((4, 1, 3)):
        ids = random_ids(spec, rows, 9, seed)
        assert deviation(feed(engine, ids, [6, 3]), reference(spec, ids)) < FLOAT32_BOUND


def test_logits_stay_when_the_next_step_runs(model):
    spec, engine = model
    ids = random_ids(spec, rows=1, length=6)
    engine.start(1)
    first = step(engine, ids[:, :3], [0])
    kept = first.copy()
    step(engine, ids[:, 3:], [3])
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 1], [0, 0, 2, 2], [2], [0, 1, 2]])
def test_reorder_permutes_repeats_and_drops_rows(model, order):
    spec, engine = model
    prefix = random_ids(spec, rows=3, length=6)
    tails = random_ids(spec, rows=len(order), length=4, seed=5)
    ids = np.concatenate([prefix[order], tails], axis=1)

    feed(engine, prefix, [6])
    engine.reorder(np.array(order))
    found = np.stack([step(engine, ids[:, [i]], [i] * len(order))[:, 0] for i in range(6, 10)], 1)
    assert deviation(found, reference(spec, ids)[:, 6:]) < FLOAT32_BOUND


def test_rows_beyond_max_batch_size_are_refused(model):
    _, engine = model
    with pytest.raises(MptTrtError, match=r"5 rows .* max_batch_size = 4"):
        engine.start(LIMITS.max_batch_size + 1)


def test_engine_says_its_limits(model):
    spec, engine = model
    assert engine.vocab_size == spec.vocab_size
    assert (engine.capacity, engine.max_batch_size, engine.max_step_tokens) == (32, 4, 16)


# --- ALiBi over long distances -------------------------------------------------------------------

FAR = BuildLimits(max_batch_size=1, max_input_len=1000, max_output_len=2000)


@pytest.fixture(scope="module")
def far_spec() -> CheckpointSpec:
    """Small slopes, 2^-1 to 2^-4: the last head sees across hundreds of tokens."""
    return CheckpointSpec(
        hidden_size=16,
        num_heads=4,
        num_layers=1,
        vocab_size=31,
        max_seq_len=3000,
        alibi_bias_max=8,
        seed=3,
    )


@pytest.mark.parametrize(
    ("storage_type", "bound"), [("float16", FLOAT16_BOUND), ("float32", FLOAT32_BOUND)]
)
def test_far_tokens_are_weighed_right(far_spec, storage_type, bound, tmp_path):
    """Logits at position 3000 are as near to the reference as at position 30."""
    ids = random_ids(far_spec, rows=1, length=FAR.cache_len)
    engine = open_spec(tmp_path, far_spec, storage_type, FAR)
    found = feed(engine, ids, [1000, 1000, 990, *[1] * 10])
    assert np.isfinite(found).all()
    expected = reference(far_spec, ids, storage_type)
    assert deviation(found[:, -500:], expected[:, -500:]) < bound


@pytest.mark.parametrize("num_heads", [4, 6])
@pytest.mark.parametrize("write", [0, 2990])
def test_bias_is_as_precise_as_float16_can_be(far_spec, num_heads, write, tmp_path):
    """Slope times distance, rounded once: half a unit in the last of 11 bits. -inf for the future.

    Absolute positions in float16 would be off by up to 1 from 2048 on.
    """
    spec = replace(far_spec, hidden_size=4 * num_heads, num_heads=num_heads)
    checkpoint = make_ft_checkpoint(tmp_path, spec, "float16")
    found = computed_bias(build_network(checkpoint, Rank(0, 1), FAR.cache_len).model, write, 10)

    # 6 heads: those of 8 at even places, then two of the odd ones (Press et al., footnote 8).
    exponents = {4: [2, 4, 6, 8], 6: [2, 4, 6, 8, 1, 3]}[num_heads]
    slopes = 2.0 ** -np.array(exponents, np.float64)[:, None, None]
    distance = np.arange(FAR.cache_len)[None] - (write + np.arange(10))[:, None]
    expected = np.where(distance <= 0, slopes * distance, -np.inf)[None]
    assert found.shape == expected.shape and found.dtype == np.float16
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    is_finite = np.isfinite(expected)
    np.testing.assert_allclose(
        found[is_finite].astype(np.float64), expected[is_finite], rtol=2.0**-11, atol=0
    )


def computed_bias(model: onnx.ModelProto, write: int, length: int) -> np.ndarray:
    """Computes `bias/attention_bias` of a step with only that part of the graph."""
    graph = model.graph
    nodes = [n for n in graph.node if n.name.startswith(("positions/", "bias/"))]
    read = {name for node in nodes for name in node.input}
    part = onnx.helper.make_graph(
        nodes,
        "bias",
        [value for value in graph.input if value.name in read],
        [onnx.helper.make_tensor_value_info("bias/attention_bias", onnx.TensorProto.FLOAT16, None)],
        [tensor for tensor in graph.initializer if tensor.name in read],
    )
    alone = onnx.helper.make_model(
        part, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    session = onnxruntime.InferenceSession(alone.SerializeToString())
    cache = next(value for value in session.get_inputs() if value.name == "past_key.0")
    feeds = {
        "input_ids": np.zeros((1, length), np.int64),
        "write_positions": np.array([write]),
        "past_key.0": np.zeros((1, *cache.shape[1:]), np.float16),
    }
    return session.run(None, feeds)[0]


# --- facts about the graph -----------------------------------------------------------------------


@pytest.mark.parametrize("storage_type", NUMPY_TYPES)
@pytest.mark.parametrize("name", FEATURES)
def test_onnx_checker_accepts_the_graph(name, storage_type, made, tmp_path):
    """Operators, attributes and inferred shapes; full_check makes inference strict."""
    network = copied(made(FEATURES[name], storage_type).network, tmp_path / "copy")
    onnx.checker.check_model(network / "rank0.onnx", full_check=True)


def copied(network: Path, target: Path) -> Path:
    """A copy of a network's folder; onnx itself refuses weights that are hard links."""
    return Path(shutil.copytree(network, target))


@pytest.fixture
def graph_of(made) -> Callable[..., onnx.ModelProto]:
    """A function that builds the graph of a spec and a storage type."""

    def build(spec: CheckpointSpec, storage_type: str = "float32") -> onnx.ModelProto:
        checkpoint = made(spec, storage_type).checkpoint
        return build_network(checkpoint, Rank(0, 1), LIMITS.cache_len).model

    return build


def test_opset_is_24_and_of_the_standard_domain_alone(graph_of):
    model = graph_of(FEATURES["everything"])
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}


PLAIN_LAYER = {
    "LayerNormalization": 2,
    "MatMul": 4,
    "Reshape": 2,
    "Transpose": 2,
    "Split": 1,
    "TensorScatter": 2,
    "Attention": 1,
    "Add": 2,
    "Gelu": 1,
}
ADDED_BY_FEATURE = {
    "multi-head": {},
    "grouped-query": {},
    "rmsnorm": {"LayerNormalization": -2, "RMSNormalization": 2},
    "clip_qkv": {"Clip": 1},
    "qk_ln": {"LayerNormalization": 2, "Split": 1, "Concat": 1},
    "biases": {"Add": 4},
    "rope": {"RotaryEmbedding": 1, "Split": 1, "Concat": 1},
}


@pytest.mark.parametrize("storage_type", NUMPY_TYPES)
@pytest.mark.parametrize("name", ADDED_BY_FEATURE)
def test_layer_has_no_more_nodes_than_its_operators(name, storage_type, graph_of):
    """17 for a plain layer; a feature adds what it is called, and no type adds a Cast."""
    graphs = (graph_of(replace(FEATURES[name], num_layers=n), storage_type).graph for n in (2, 3))
    two, three = (Counter(node.op_type for node in graph.node) for graph in graphs)
    expected = Counter(PLAIN_LAYER)
    expected.update(ADDED_BY_FEATURE[name])
    assert expected.total() == 17 + sum(ADDED_BY_FEATURE[name].values())
    assert three - two == +expected and not two - three


@pytest.mark.parametrize(("storage_type", "nodes"), [("float32", 19), ("float16", 20)])
def test_nodes_outside_the_layers(storage_type, nodes, graph_of):
    """Positions, bias, embedding and head; half precision adds one, the Cast of the bias."""
    model = graph_of(CheckpointSpec(num_layers=1), storage_type)
    assert len(model.graph.node) - 17 == nodes


@pytest.mark.parametrize("name", FEATURES)
def test_names_are_readable_and_unique(name, graph_of):
    spec = FEATURES[name]
    graph = graph_of(spec).graph
    for node in graph.node:
        if node.op_type == "Split":
            assert all(
                part.rpartition("/")[0] == node.name.rpartition("/")[0] for part in node.output
            )
        else:
            assert list(node.output) == [node.name]
    values = [output for node in graph.node for output in node.output]
    values += [value.name for value in (*graph.input, *graph.initializer)]
    assert len(values) == len(set(values))
    nodes = [node.name for node in graph.node]
    assert len(nodes) == len(set(nodes))
    assert not [
        value for value in values if not re.fullmatch(r"[a-z][a-z0-9_]*([./][a-z0-9_]+)*", value)
    ]
    read = {name for node in graph.node for name in node.input}
    produced = {value.name for value in graph.output}
    assert set(values) == read | produced, "every value is used"
    for layer in range(spec.num_layers):
        assert f"layers.{layer}.attention/scaled_dot_product" in nodes


def test_inputs_and_outputs(graph_of):
    spec = CheckpointSpec(num_heads=6, num_kv_heads=2)
    graph = graph_of(spec, "float16").graph
    cache = (onnx.TensorProto.FLOAT16, ["batch", 2, 32, 8])
    kinds = [(kind, layer) for layer in range(2) for kind in ("key", "value")]
    assert described(graph.input) == {
        "input_ids": (onnx.TensorProto.INT64, ["batch", "seq"]),
        "write_positions": (onnx.TensorProto.INT64, ["batch"]),
        "logit_positions": (onnx.TensorProto.INT64, ["num_logits", 2]),
        **{f"past_{kind}.{layer}": cache for kind, layer in kinds},
    }
    assert described(graph.output) == {
        "logits": (onnx.TensorProto.FLOAT, ["num_logits", 97]),
        **{f"present_{kind}.{layer}": cache for kind, layer in kinds},
    }


def described(values) -> dict[str, tuple[int, list]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


@pytest.mark.parametrize("name", ["multi-head", "everything", "learned positions", "rmsnorm"])
def test_weights_lie_outside_the_graph_as_the_checkpoints_own_files(name, made):
    both = made(FEATURES[name], "float16")
    checkpoint, network = both.checkpoint, both.network
    graph = onnx.load(network / "rank0.onnx", load_external_data=False).graph
    inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert max(tensor.ByteSize() for tensor in inside) < 1024

    locations = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    present = {f"{WEIGHTS_FOLDER}/{path.name}" for path in (network / WEIGHTS_FOLDER).iterdir()}
    assert locations == present
    for location in locations:
        of_checkpoint = checkpoint.folder / Path(location).name
        assert (network / location).samefile(of_checkpoint), location

    tensors = {path.name for path in checkpoint.folder.glob("*.bin")}
    unused = tensors - {Path(location).name for location in locations}
    assert all(not np.fromfile(checkpoint.folder / file, np.uint8).any() for file in unused), (
        "only FT's placeholders of zeros are left out"
    )


def test_folder_holds_the_graph_its_weights_and_its_description(made):
    network = made(CheckpointSpec(num_layers=1)).network
    top = [path for path in tree(network) if "/" not in path]
    assert top == ["rank0.network.json", "rank0.onnx", WEIGHTS_FOLDER]


def test_weights_are_copied_to_another_file_system(tmp_path, other_file_system):
    spec = FEATURES["multi-head"]
    checkpoint = make_ft_checkpoint(tmp_path, spec)
    network = make_network(checkpoint, other_file_system / "network")
    for path in (network / WEIGHTS_FOLDER).iterdir():
        assert path.read_bytes() == (checkpoint.folder / path.name).read_bytes()
        assert path.stat().st_nlink == 1
    ids = random_ids(spec, rows=1, length=5)
    assert deviation(feed(open_network(network), ids, [5]), reference(spec, ids)) < FLOAT32_BOUND


@pytest.fixture
def other_file_system(tmp_path):
    shared_memory = Path("/dev/shm")
    if not os.access(shared_memory, os.W_OK) or (
        shared_memory.stat().st_dev == tmp_path.stat().st_dev
    ):
        pytest.skip("no second file system here")
    folder = shared_memory / f"test-network-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_same_checkpoint_gives_the_same_bytes(made, tmp_path):
    both = made(FEATURES["everything"], "bfloat16")
    first, second = both.network, make_network(both.checkpoint, tmp_path / "second")
    assert tree(first) == tree(second)
    for path in first.glob("*.*"):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


MPT_7B = """[gpt]
model_name = mpt-7b
n_head = 32
n_embd = 4096
n_inner = 16384
n_positions = 2048
n_layer = 32
vocab_size = 50432
storage_dtype = float16
tensor_parallelism = 1
bias = False
position_embedding_type = alibi
"""
MPT_7B_PARAMETERS = 6_649_286_656


def mpt_7b(folder: Path) -> FtCheckpoint:
    """mpt-7b as NVIDIA's converter would leave it, all zeros, in files without blocks on disk."""
    folder.mkdir(parents=True)
    (folder / "config.ini").write_text(MPT_7B)
    sizes = {"model.wte.bin": 50432 * 4096}
    for norm in ("final_layernorm", *_of_layers("input_layernorm", "post_attention_layernorm")):
        sizes |= {f"model.{norm}.{part}.bin": 4096 for part in ("weight", "bias")}
    for name, columns in (
        ("attention.query_key_value", 3 * 4096),
        ("attention.dense", 4096),
        ("mlp.dense_h_to_4h", 4 * 4096),
        ("mlp.dense_4h_to_h", 4 * 4096),
    ):
        sizes |= {f"model.{layer}.weight.0.bin": 4096 * columns for layer in _of_layers(name)}
    for file, elements in sizes.items():
        with (folder / file).open("wb") as stream:
            stream.truncate(2 * elements)
    return read_ft_checkpoint(folder)


def _of_layers(*names: str) -> list[str]:
    return [f"layers.{layer}.{name}" for layer in range(32) for name in names]


def test_graph_of_a_real_model_is_small(tmp_path):
    checkpoint = mpt_7b(tmp_path / "1-gpu")
    network = build_network(checkpoint, Rank(0, 1), 2048)
    assert len(network.model.SerializeToString()) < 1_000_000
    assert len(network.model.graph.node) == 20 + 17 * 32
    total = sum(path.stat().st_size for path in network.files.values())
    assert total == 2 * MPT_7B_PARAMETERS


# --- rejections ----------------------------------------------------------------------------------


def test_checkpoint_of_another_tp_size_is_refused(made):
    checkpoint = made(CheckpointSpec(num_layers=1)).checkpoint
    with pytest.raises(MptTrtError, match=r"tensor_parallelism = 1.*2 ranks.*-tp 2"):
        build_network(checkpoint, Rank(0, 2), 32)


@pytest.mark.parametrize(("max_output_len", "is_legal"), [(48, True), (49, False)])
def test_limits_beyond_learned_positions_are_refused(max_output_len, is_legal, tmp_path):
    spec = CheckpointSpec(num_layers=1, alibi=False, max_seq_len=64)
    checkpoint = make_ft_checkpoint(tmp_path, spec)
    limits = BuildLimits(1, 16, max_output_len)
    if is_legal:
        make_network(checkpoint, tmp_path / "network", limits)
        return
    with pytest.raises(MptTrtError, match=r"= 65, but the model has learned positions for 64"):
        make_network(checkpoint, tmp_path / "network", limits)
    assert tree(tmp_path / "ft") and not [p for p in tree(tmp_path) if "network" in p]


def test_alibi_reaches_beyond_the_trained_length(tmp_path):
    spec = CheckpointSpec(num_layers=1, max_seq_len=8)
    engine = open_spec(tmp_path, spec)
    ids = random_ids(spec, rows=1, length=20)
    expected = reference(replace(spec, max_seq_len=64), ids)
    assert deviation(feed(engine, ids, [10, 10]), expected) < FLOAT32_BOUND


def test_config_of_every_feature_survives_the_checkpoint(made):
    """The network reads FT's config.ini, so nothing may be lost on the way."""
    config = made(FEATURES["everything"]).checkpoint.config
    assert config == MptConfig(
        hidden_size=60,
        num_heads=6,
        num_kv_heads=3,
        num_layers=3,
        intermediate_size=150,
        vocab_size=53,
        max_seq_len=64,
        softmax_scale=0.4,
        alibi_bias_max=4,
        clip_qkv=1.5,
        qk_ln=True,
        logit_scale=0.7,
        layer_norm_epsilon=1e-3,
        bias=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
