"""The GPU memory of an engine, against its networks and by hand; known shapes and the tables."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from onnx import TensorProto, numpy_helper

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.calibration.result import CalibrationResult
from mpt_trt.checkpoint.hf_config import parse_hf_config
from mpt_trt.checkpoint.known_models import SHAPES, SHIPPED, hub_config, known_config
from mpt_trt.engines import memory
from mpt_trt.engines.memory import GB
from mpt_trt.engines.spec import BuildLimits, EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import Int8Layers
from mpt_trt.model.sharding import Rank, VocabularySharding, is_legal
from mpt_trt.model.tensors import BlockMatrix
from mpt_trt.network.decoder import build_network
from mpt_trt.quantization.calibrated_weights import Fp8Scales, KvAmax
from mpt_trt.quantization.schemes import (
    Awq,
    Fp8,
    Mixed,
    Quantization,
    SmoothQuant,
    WeightOnly,
    calibration_format,
)
from mpt_trt.workflow.settings import parse_settings
from support.checkpoints import CheckpointSpec
from support.engines import FEATURES, call_tool
from support.paths import REPOSITORY
from support.specs import LIMITS, SPECS, VOCABULARIES, WHOLE, config_of, plan_for, require_monotonic
from tools import markdown, update_docs

# --- against the networks ------------------------------------------------------------------------


def network_of(spec: EngineSpec, rank: int):
    checkpoint = FtCheckpoint(Path("ft"), spec.config, spec.dtype, spec.tp_size, "m", {})
    part = Rank(rank, spec.tp_size)
    return build_network(checkpoint, part, spec.limits.cache_len, spec.vocabulary).model.graph


def held_bytes(graph, element_bytes: int) -> int:
    """Bytes of all weights, and of the parts that are sliced from them when loaded."""
    found = {t.name: t for t in graph.initializer}
    held = [t for t in found.values() if t.external_data or t.name == "head/padding"]
    elements = sum(math.prod(t.dims) for t in held)
    for node in graph.node:
        if node.op_type == "Slice" and node.input[0] in found:
            start, stop = (int(numpy_helper.to_array(found[n])[0]) for n in node.input[1:3])
            elements += (stop - start) * math.prod(found[node.input[0]].dims[1:])
    return element_bytes * elements


QUANTIZATIONS = [
    Quantization(WeightOnly(8)),
    Quantization(WeightOnly(4)),
    Quantization(WeightOnly(4, 16)),
    Quantization(Awq(16)),
    Quantization(Awq(16), "int8"),
    *(
        Quantization(SmoothQuant(0.5, *flags))
        for flags in itertools.product((True, False), repeat=2)
    ),
    Quantization(Fp8()),
    Quantization(None, "fp8"),
]
BITS = {TensorProto.INT4: 4, TensorProto.INT8: 8, TensorProto.FLOAT8E4M3FN: 8}


def stored_bytes(graph) -> int:
    """Bytes of all weights in their stored types."""
    return sum(
        math.ceil(
            math.prod(t.dims)
            * BITS.get(t.data_type, 32 if t.data_type == TensorProto.FLOAT else 16)
            / 8
        )
        for t in graph.initializer
        if t.external_data
    )


class Calibrated(CalibrationResult):
    """Calibration of a planned model; a network needs nothing else before it is written."""

    def __init__(self, quantization_format: str):
        self.__dict__ |= {
            "quantization_format": quantization_format,
            "group_size": 16 if quantization_format == "int4_awq" else None,
        }

    def fp8_scales(self, layer: int, matrix: str) -> Fp8Scales:
        return Fp8Scales(1.0, 1.0)

    def kv_amax(self, layer: int) -> KvAmax:
        return KvAmax(1.0, 1.0)


@pytest.mark.parametrize("name", ["multi-head", "grouped-query", "clip_qkv", "biases"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
def test_quantized_rank_weights_are_those_of_the_network(
    name: str, quantization: Quantization
) -> None:
    config = config_of(replace(FEATURES[name], hidden_size=96, vocab_size=96))
    needed = calibration_format(quantization.scheme, quantization.kv_cache)
    calibrated = CalibratedQuantization(
        quantization, None if needed is None else Calibrated(needed)
    )
    is_smoothed = isinstance(quantization.scheme, SmoothQuant)
    for tp_size in filter(lambda size: is_legal(config, size), (1, 2)):
        checkpoint = FtCheckpoint(
            folder=Path("ft"),
            config=config,
            storage_type="float16",
            tp_size=tp_size,
            model_name="m",
            manifest={},
            smoothing=0.5 if is_smoothed else None,
            int8_layers=Int8Layers.ALL if is_smoothed else Int8Layers.NONE,
        )
        spec = EngineSpec(config, "float16", tp_size, LIMITS, WHOLE, quantization)
        graph = build_network(checkpoint, Rank(0, tp_size), 32, WHOLE, calibrated).model.graph
        assert memory.rank_weights(spec) == stored_bytes(graph)
        cache = memory.kv_cache(spec) / memory.kv_cache(
            EngineSpec(config, "float16", tp_size, LIMITS, WHOLE)
        )
        assert cache == (1 if quantization.kv_cache == "auto" else 0.5)


def test_mixed_matrices_are_those_of_every_layer() -> None:
    config = config_of(FEATURES["multi-head"])
    assert config.num_layers == 2

    def size(*formats: str) -> int:
        choice = tuple(name for name in formats for _ in BlockMatrix)
        quantization = Quantization(Mixed(6.0, choice))
        return memory.matrix_bytes(EngineSpec(config, "float16", 1, LIMITS, WHOLE, quantization))

    small, large = "int4-g16", "int8"
    assert size(small, small) < size(large, large)
    assert 2 * size(small, large) == size(small, small) + size(large, large)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=str)
def test_rank_weights_are_those_of_the_network(name: str, vocabulary: VocabularySharding) -> None:
    config = config_of(FEATURES[name])
    for tp_size in filter(lambda size: is_legal(config, size), (1, 2, 3, 4, 6, 8)):
        spec = EngineSpec(config, "float16", tp_size, LIMITS, vocabulary)
        held = [held_bytes(network_of(spec, rank), 2) for rank in range(tp_size)]
        assert memory.rank_weights(spec) == held[0] == max(held)


@pytest.mark.parametrize("name", ["multi-head", "multi-query", "24 heads, grouped-query"])
@pytest.mark.parametrize(("dtype", "element_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_kv_cache_is_that_of_the_network(name: str, dtype: str, element_bytes: int) -> None:
    config = config_of(FEATURES[name])
    for tp_size in filter(lambda size: is_legal(config, size), (1, 2, 4, 8)):
        spec = EngineSpec(config, dtype, tp_size, BuildLimits(5, 20, 7), WHOLE)
        caches = [i for i in network_of(spec, 0).input if i.name.startswith("past_")]
        assert len(caches) == 2 * config.num_layers
        shapes = [[d.dim_value for d in i.type.tensor_type.shape.dim][1:] for i in caches]
        expected = 5 * element_bytes * sum(map(math.prod, shapes))
        assert memory.kv_cache(spec) == expected


# --- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # The first is what the hub's index of mpt-7b gives: 13,298,573,312 bytes of 2 each.
        ("mpt-7b", 6_649_286_656),
        ("mpt-30b", 50432 * 7168 + 48 * (12 * 7168**2 + 2 * 7168) + 7168),
        (
            "replit-code-v1_5-3b",
            32768 * 3072 + 32 * (2 * 3072**2 + 2 * 3072 * 1024 + 8 * 3072**2 + 2 * 3072) + 3072,
        ),
    ],
)
def test_one_rank_holds_every_parameter_once(name: str, parameters: int) -> None:
    for dtype, size in (("float32", 4), ("float16", 2), ("bfloat16", 2)):
        assert memory.rank_weights(plan_for(name, dtype)) == size * parameters


def test_mpt_7b_by_hand() -> None:
    spec = plan_for("mpt-7b")
    assert memory.kv_cache(spec) == 8 * 576 * 2 * 32 * 4096 * 2
    assert memory.kv_cache(replace(spec, tp_size=4)) == 8 * 576 * 2 * 32 * 1024 * 2
    short = replace(spec, limits=BuildLimits(8, 64, 64))
    tokens, residual = 8 * 64, 3 * 4096
    assert memory.activations(short) == 2 * tokens * (128 * 32 + residual + 2 * 16384)
    halves = replace(short, tp_size=2)
    assert memory.activations(halves) == 2 * tokens * (128 * 16 + residual + 2 * 8192)


@pytest.mark.parametrize(
    ("limits", "dtype", "largest"),
    [
        (BuildLimits(8, 512, 64), "float16", 8 * 512 * 576 * 32 * 4),  # the bias, before rounding
        (BuildLimits(8, 512, 64), "float32", 8 * 512 * 4 * (2 * 3 * 4096 + 3 * 576 * 32)),
        (BuildLimits(8, 16, 1, True), "float16", 8 * 16 * 50432 * (2 + 2 * 4)),
    ],
)
def test_largest_phase_decides_about_activations(
    limits: BuildLimits, dtype: str, largest: int
) -> None:
    spec = replace(plan_for("mpt-7b", dtype), limits=limits)
    tokens = limits.max_batch_size * limits.max_input_len
    shared = spec.element_bytes * tokens * (limits.cache_len * 32 + 3 * 4096)
    assert memory.activations(spec) == shared + largest


def test_learned_positions_have_one_bias_for_all_heads() -> None:
    learned = config_of(CheckpointSpec(hidden_size=16, alibi=False, max_seq_len=9999))
    alibi = config_of(CheckpointSpec(hidden_size=16, max_seq_len=9999))
    ratios = [
        memory.activations(EngineSpec(config, "float16", 1, BuildLimits(1, 8, 9000), WHOLE))
        for config in (alibi, learned)
    ]
    assert ratios[0] / ratios[1] == pytest.approx(4, rel=0.05)


# --- in general ----------------------------------------------------------------------------------

QUANTITIES = (memory.rank_weights, memory.kv_cache, memory.activations, memory.gpu_memory)


@given(SPECS)
def test_more_of_anything_never_needs_less(spec: EngineSpec) -> None:
    require_monotonic(QUANTITIES, spec)


@given(SPECS.filter(lambda spec: spec.tp_size > 1))
def test_a_rank_of_more_needs_less(spec: EngineSpec) -> None:
    fewer = replace(spec, tp_size=spec.tp_size // 2)
    # Each of two ranks' heads may be a second copy next to a whole embedding.
    for quantity in QUANTITIES if fewer.tp_size > 1 else QUANTITIES[1:3]:
        assert quantity(spec) <= quantity(fewer)


@given(SPECS)
def test_gpu_memory_is_the_sum_of_its_parts(spec: EngineSpec) -> None:
    parts = (memory.rank_weights, memory.kv_cache, memory.activations)
    assert memory.gpu_memory(spec) == sum(p(spec) for p in parts) + memory.GPU_OVERHEAD
    size = memory.gpu_class(spec)
    smaller = [c for c in memory.GPU_CLASSES_GB if size is None or c < size]
    assert all(c * GB < memory.gpu_memory(spec) for c in smaller)
    assert size is None or size * GB >= memory.gpu_memory(spec)


def test_illegal_number_of_ranks_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(MptTrtError, match=r"tensor-parallel size 5 .* valid sizes are 1, 2, 4, 8"):
        plan_for("mpt-7b", tp_size=5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (plan_for("replit-code-v1_5-3b"), "1 GPU of 16 GB"),
        (plan_for("mpt-30b", "float32", 4), "4 GPUs of 40 GB"),
        (plan_for("mpt-30b", "float32"), "1 GPU of more than 80 GB"),
    ],
)
def test_gpus_in_words(spec: EngineSpec, words: str) -> None:
    assert memory.gpus_in_words(spec) == words


def test_a_gpu_is_refused_for_what_is_exact_alone() -> None:
    spec = plan_for("mpt-30b", "float32", 4)
    exact = memory.rank_weights(spec) + memory.kv_cache(spec)
    assert memory.gpu_obstacle(spec, exact) is None
    assert memory.gpu_obstacle(spec, 25 * GB) == (
        f"weights and KV cache of a rank take {exact / GB:.1f} GB, this GPU has 25.0 GB; "
        "this needs 4 GPUs of 40 GB"
    )


# --- known shapes, table, tool -------------------------------------------------------------------


def test_every_shipped_model_is_known_by_its_hub_name() -> None:
    settings = parse_settings(yaml.safe_load((REPOSITORY / "config.yaml").read_text()))
    sources = {name: model.source for name, model in settings.models.items()}
    assert sources.pop("mpt-demo") == "resources/mpt-demo"
    assert {source.partition("/")[2] for source in sources.values()} == set(SHIPPED)
    assert all(source.endswith(f"/{name}") for name, source in sources.items())


def test_storywriter_keeps_its_peculiarities() -> None:
    config = known_config("mpt-7b-storywriter")
    assert (config.alibi_bias_max, config.clip_qkv, config.max_seq_len) == (16, 6.0, 65536)
    plain = replace(config, alibi_bias_max=8, clip_qkv=None, max_seq_len=2048)
    assert plain == known_config("mpt-7b")


@pytest.mark.parametrize("name", SHAPES)
def test_fewer_layers_change_nothing_else(name: str) -> None:
    content = hub_config(name, num_layers=2, dtype="bfloat16")
    assert content["torch_dtype"] == "bfloat16"
    cut = parse_hf_config(content, Path("config.json"))
    assert cut.num_layers == 2
    assert cut == replace(known_config(name), num_layers=2)


def test_committed_table_is_what_is_computed() -> None:
    found = markdown.between_marks(REPOSITORY / "docs" / "requirements.md")
    assert found == update_docs.requirements().strip(), "run make docs"


def test_table_has_every_model_type_and_legal_number_of_ranks() -> None:
    headings = re.findall(r"^### (.*)$", update_docs.requirements(), re.MULTILINE)
    assert sorted(", ".join(headings).split(", ")) == sorted(SHIPPED)
    cells = [row.split(" | ")[:2] for row in update_docs.table_rows(known_config("mpt-30b"))]
    expected = {(kind, tp) for kind in update_docs.KINDS for tp in "1248"}
    found = {(kind, tp) for kinds, tp in cells for kind in kinds.strip("| ").split(", ")}
    assert found == expected
    odd = config_of(CheckpointSpec(num_heads=6))
    assert {row.split(" | ")[1] for row in update_docs.table_rows(odd)} == {"1", "2"}


def test_tool_shows_a_folder_as_it_shows_the_known_shape(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hub_config("mpt-7b")))
    options = ("--dtype", "float32", "-tp", "2", "--max_batch_size", "16")
    call_tool("show_requirements.py", "--like", "mpt-7b", *options)
    known = capsys.readouterr().out.splitlines()
    call_tool("show_requirements.py", "--model_dir", tmp_path, *options)
    folder = capsys.readouterr().out.splitlines()
    assert known[1:] == folder[1:]
    spec = replace(plan_for("mpt-7b", "float32", 2), limits=BuildLimits(16, 512, 64))
    assert known[0] == f"mpt-7b, float32: {memory.gpus_in_words(spec)}"
    (weights,) = (line for line in known if line.split()[0] == "weights")
    assert weights.split()[1:] == [f"{memory.rank_weights(spec) / GB:.2f}", "GB"]
