"""Networks and engines of several ranks, without MPI: `merged_ranks` runs all ranks in one process.

`test_mpi.py` runs the ranks as processes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

import mpt_trt
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.engines.build.assemble import assemble_engine
from mpt_trt.engines.build.build import build_rank
from mpt_trt.engines.build.rank_network import NetworkInputs, write_networks
from mpt_trt.engines.manifest import check_content, read_manifest
from mpt_trt.engines.spec import BuilderChoice
from mpt_trt.engines.tensorrt import plan_builder
from mpt_trt.engines.tensorrt.packages import installed_package
from mpt_trt.engines.tensorrt.plan_builder import BuildOptions
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Rank, VocabularySharding
from mpt_trt.model.tensors import weights
from mpt_trt.network.graph import COLLECTIVE, COLLECTIVE_DOMAIN
from references.merged_ranks import MergedRanks
from support.checkpoints import CheckpointSpec, config_dict, write_checkpoint
from support.engines import (
    COMPUTE_CAPABILITIES,
    LIMITS,
    call_tool,
    deviation,
    feed,
    make_rank_network,
    one_line_error,
    random_ids,
    reference,
    run_tool,
    tree,
)

# In standard deviations of the logits. float32 rounds to 6e-8, and sums of some hundred terms in
# another order come out a few times that far apart: up to 3.1e-6 was measured. float16 rounds to
# 5e-4, the partial sums of ranks once more before they meet: up to 2.9e-3 was measured.
FLOAT32_BOUND = 1e-5
FLOAT16_BOUND = 1e-2

# A vocabulary of 96 is divisible by 2 and 4; 131 leaves the last rank with less, 5 on 4 ranks (2 a
# rank) with nothing but padding.
ARCHITECTURES = {
    "4 heads": CheckpointSpec(vocab_size=96),
    "12 heads": CheckpointSpec(vocab_size=96, num_heads=12),
    "8 heads, 2 K/V": CheckpointSpec(vocab_size=96, num_heads=8, num_kv_heads=2),
    "12 heads, 4 K/V": CheckpointSpec(vocab_size=96, num_heads=12, num_kv_heads=4),
    "multi-query": CheckpointSpec(vocab_size=96, num_kv_heads=1),
    "clip_qkv": CheckpointSpec(vocab_size=96, clip_qkv=0.75),
    "alibi_bias_max": CheckpointSpec(vocab_size=96, num_heads=12, alibi_bias_max=16),
    "qk_ln": CheckpointSpec(vocab_size=96, num_heads=8, num_kv_heads=2, qk_ln=True),
    "qk_ln, biases": CheckpointSpec(vocab_size=96, qk_ln=True, no_bias=False),
    "qk_ln, multi-query": CheckpointSpec(num_kv_heads=1, qk_ln=True, no_bias=False),
    "biases": CheckpointSpec(vocab_size=96, no_bias=False),
    "untied head": CheckpointSpec(vocab_size=96, tie_word_embeddings=False),
    "expansion 2.5": CheckpointSpec(vocab_size=96, expansion_ratio=2.5),
    "learned positions, rmsnorm": CheckpointSpec(vocab_size=96, alibi=False, norm_type="rmsnorm"),
    "rope, qk_ln": CheckpointSpec(num_heads=8, num_kv_heads=2, qk_ln=True, rope={"rope_theta": 9}),
    "logit_scale": CheckpointSpec(vocab_size=96, logit_scale=0.4),
    "vocabulary of 131": CheckpointSpec(vocab_size=131),
    "vocabulary of 131, untied": CheckpointSpec(vocab_size=131, tie_word_embeddings=False),
    "vocabulary of 5": CheckpointSpec(vocab_size=5),
    "vocabulary of 5, untied": CheckpointSpec(vocab_size=5, tie_word_embeddings=False),
}
VOCABULARIES = {
    "nothing sharded": VocabularySharding(embedding=False, head=False),
    "embedding sharded": VocabularySharding(embedding=True, head=False),
    "head sharded": VocabularySharding(embedding=False, head=True),
    "both sharded": VocabularySharding(embedding=True, head=True),
}
BUILDER = BuilderChoice("tensorrt_rtx", COMPUTE_CAPABILITIES)
LIMIT_FLAGS = ("--max_batch_size=4", "--max_input_len=16", "--max_output_len=16")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A function that makes the FT checkpoint of (spec, tp_size, storage type), once each."""
    folder = tmp_path_factory.mktemp("converted")

    @cache
    def source(spec: CheckpointSpec) -> Path:
        return write_checkpoint(folder / f"hf{source.cache_info().misses}", spec)

    @cache
    def convert(spec: CheckpointSpec, tp_size: int, storage: str = "float32") -> FtCheckpoint:
        hf_folder = source(spec)
        config = read_hf_config(hf_folder)
        settings = ConversionSettings(storage, tp_size, 0, "test-model", {"folder": "somewhere"})
        target = folder / f"{hf_folder.name}-{storage}" / f"{tp_size}-gpu"
        checkpoint = HfCheckpoint(hf_folder, weights(config))
        write_ft_checkpoint(checkpoint, config, settings, target)
        return read_ft_checkpoint(target)

    return convert


def make_networks(checkpoint: FtCheckpoint, folder: Path, vocabulary: VocabularySharding) -> Path:
    """The networks of all ranks in one folder."""
    write_networks(NetworkInputs(checkpoint, LIMITS, vocabulary), folder)
    return folder


def merged(checkpoint: FtCheckpoint, folder: Path, vocabulary: VocabularySharding) -> MergedRanks:
    return MergedRanks(make_networks(checkpoint, folder, vocabulary), checkpoint.tp_size)


# --- numerics ------------------------------------------------------------------------------------


# `step` of MergedRanks also checks that the ranks' logits are the same, bit for bit.


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ranks_together_compute_the_plain_model(name, tp_size, vocabulary, converted, tmp_path):
    spec = ARCHITECTURES[name]
    ids = random_ids(spec, rows=2, length=9)
    model = merged(converted(spec, tp_size), tmp_path, VOCABULARIES[vocabulary])
    found = feed(model, ids, [7, 1, 1])
    assert found.shape == (2, 9, spec.vocab_size) and found.dtype == np.float32
    assert deviation(found, reference(spec, ids)) < FLOAT32_BOUND


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_rank_computes_the_plain_model(name, converted, tmp_path):
    spec = ARCHITECTURES[name]
    ids = random_ids(spec, rows=2, length=9)
    model = merged(converted(spec, 1), tmp_path, VOCABULARIES["both sharded"])
    assert deviation(feed(model, ids, [7, 1, 1]), reference(spec, ids)) < FLOAT32_BOUND


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize(
    "name", ["8 heads, 2 K/V", "qk_ln, biases", "learned positions, rmsnorm", "vocabulary of 131"]
)
def test_float16_stays_within_its_rounding(name, tp_size, converted, tmp_path):
    spec = ARCHITECTURES[name]
    ids = random_ids(spec, rows=2, length=9)
    checkpoint = converted(spec, tp_size, "float16")
    found = feed(merged(checkpoint, tmp_path, VOCABULARIES["both sharded"]), ids, [7, 1, 1])
    error = deviation(found, reference(spec, ids, "float16"))
    assert FLOAT32_BOUND < error < FLOAT16_BOUND, "below: this was not computed in float16"


def test_a_rank_that_computes_something_else_shows(converted, tmp_path):
    """The tests above rest on this: each rank's weights matter, and ranks are compared."""
    spec = ARCHITECTURES["4 heads"]
    checkpoint = converted(spec, 2)
    ids = random_ids(spec, rows=2, length=9)
    folder = make_networks(checkpoint, tmp_path, VOCABULARIES["nothing sharded"])
    weight = folder / "weights" / "model.layers.1.mlp.dense_4h_to_h.weight.1.bin"
    negated = -np.fromfile(weight, np.float32)
    weight.unlink()  # a hard link to the checkpoint's own
    negated.tofile(weight)
    found = feed(MergedRanks(folder, 2), ids, [7, 1, 1])
    assert deviation(found, reference(spec, ids)) > 0.1

    graph = onnx.load(folder / "rank1.onnx", load_external_data=False)
    final = next(node for node in graph.graph.node if node.name == "logits")
    final.op_type, final.input[:] = "Add", [final.input[0], final.input[0]]
    del final.attribute[:]
    onnx.save(graph, folder / "rank1.onnx")
    with pytest.raises(AssertionError, match="ranks do not agree"):
        feed(MergedRanks(folder, 2), ids, [7, 1, 1])


# --- vocabulary ----------------------------------------------------------------------------------


def config_with(vocab_size: int) -> MptConfig:
    return MptConfig(
        hidden_size=64,
        num_heads=64,
        num_kv_heads=64,
        num_layers=1,
        intermediate_size=64,
        vocab_size=vocab_size,
        max_seq_len=8,
        softmax_scale=1.0,
    )


@given(st.integers(1, 300_000), st.integers(1, 64))
def test_vocabulary_is_cut_in_order_with_padding_at_the_end(vocab_size: int, tp_size: int) -> None:
    config = config_with(vocab_size)
    width = sharding.vocabulary_width(config, tp_size)
    rows = [sharding.vocabulary_rows(config, rank) for rank in sharding.all_ranks(tp_size)]
    end = 0
    for part in rows:
        assert part.start == end, "a row is missing or held twice"
        assert 0 <= len(part) <= width
        assert len(part) == width or part.stop == vocab_size, "padding before the end"
        end = part.stop
    assert end == vocab_size
    assert (width - 1) * tp_size < vocab_size, "a smaller width would do"


@given(st.integers(1, 40), st.integers(1, 8))
def test_gathered_parts_without_what_is_beyond_the_vocabulary(vocab_size, tp_size) -> None:
    config = config_with(vocab_size)
    table = np.arange(1, vocab_size + 1)
    parts = np.zeros((tp_size, sharding.vocabulary_width(config, tp_size)), int)
    for rank in range(tp_size):
        rows = sharding.vocabulary_rows(config, Rank(rank, tp_size))
        parts[rank, : len(rows)] = table[rows.start : rows.stop]
    assert np.array_equal(parts.ravel()[:vocab_size], table)
    assert not parts.ravel()[vocab_size:].any()


@pytest.mark.parametrize(
    ("vocab_size", "tp_size", "sizes"),
    [
        (50432, 4, [12608] * 4),
        (131, 4, [33, 33, 33, 32]),
        (5, 4, [2, 2, 1, 0]),
        (3, 8, [1, 1, 1, 0, 0, 0, 0, 0]),
    ],
)
def test_examples_of_vocabulary_rows(vocab_size, tp_size, sizes) -> None:
    config = config_with(vocab_size)
    found = [len(sharding.vocabulary_rows(config, rank)) for rank in sharding.all_ranks(tp_size)]
    assert found == sizes


# --- the graph -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meeting:
    """A collective node as the graph has it."""

    value: str
    operation: str
    reduction: str


def collectives(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == COLLECTIVE]


def load(path: Path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def meetings(graph: onnx.GraphProto) -> list[Meeting]:
    found = []
    for node in collectives(graph):
        values = attributes(node)
        operation, reduction = values["collective_operation"], values["reduce_op"]
        found.append(Meeting(node.input[0], operation.decode(), reduction.decode()))
    return found


def expected_meetings(spec: CheckpointSpec, vocabulary: VocabularySharding) -> list[Meeting]:
    values = []
    for layer in range(spec.num_layers):
        attention = f"layers.{layer}.attention"
        values += [f"{attention}/own_means"] * spec.qk_ln
        values += [f"{attention}.dense", f"layers.{layer}.mlp.dense_4h_to_h"]
    values = ["embedding/own_part"] * vocabulary.embedding + values
    sums = [Meeting(value, "all_reduce", "sum") for value in values]
    return sums + [Meeting("head/own_product", "all_gather", "none")] * vocabulary.head


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", ["4 heads", "qk_ln, biases", "untied head", "vocabulary of 5"])
def test_ranks_meet_where_rows_meet_and_nowhere_else(name, vocabulary, converted, tmp_path):
    spec = ARCHITECTURES[name]
    make_networks(converted(spec, 4), tmp_path, VOCABULARIES[vocabulary])
    for rank in range(4):
        graph = load(tmp_path / f"rank{rank}.onnx")
        assert meetings(graph) == expected_meetings(spec, VOCABULARIES[vocabulary])
        for node in collectives(graph):
            found = attributes(node)
            assert node.domain == COLLECTIVE_DOMAIN
            # group_size 0: the group is all ranks. root: of no meaning for these, -1 for none.
            assert (found["group_size"], found["nb_rank"], found["root"]) == (0, 4, -1)


def test_one_rank_meets_nobody(converted, tmp_path):
    make_networks(converted(ARCHITECTURES["qk_ln"], 1), tmp_path, VOCABULARIES["both sharded"])
    model = onnx.load(tmp_path / "rank0.onnx", load_external_data=False)
    assert collectives(model.graph) == []
    assert [opset.domain for opset in model.opset_import] == [""]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", ["8 heads, 2 K/V", "qk_ln, biases", "untied head"])
def test_a_rank_reads_its_own_files_and_the_common_ones(name, vocabulary, converted, tmp_path):
    checkpoint = converted(ARCHITECTURES[name], 4)
    numbered = re.compile(r"\.([0-9])\.bin$")
    for rank in sharding.all_ranks(4):
        folder = tmp_path / f"rank{rank.index}"
        make_rank_network(NetworkInputs(checkpoint, LIMITS, VOCABULARIES[vocabulary]), rank, folder)
        linked = {path.name for path in (folder / "weights").iterdir()}
        read = {
            entry.value
            for tensor in load(folder / f"rank{rank.index}.onnx").initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert read == {f"weights/{file}" for file in linked}
        ranks = Counter(match[1] for file in linked if (match := numbered.search(file)))
        assert list(ranks) == [str(rank.index)]
        assert ranks[str(rank.index)] >= 4 * checkpoint.config.num_layers


# --- TensorRT ------------------------------------------------------------------------------------


def parsed_collectives(path: Path) -> list[int]:
    """num_ranks of each collective layer that TensorRT's parser makes of a network."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), parser.get_error(0).desc()
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = [layer for layer in layers if layer.type == trt.LayerType.DIST_COLLECTIVE]
    for layer in found:
        layer.__class__ = trt.IDistCollectiveLayer
    return [layer.num_ranks for layer in found]


SHARDED_AND_BUILT = {
    "vocabulary of 131": (2, "float16"),
    "vocabulary of 131, untied": (2, "float16"),
    "vocabulary of 5": (4, "float32"),
    "vocabulary of 5, untied": (4, "float32"),
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", SHARDED_AND_BUILT)
def test_tensorrt_builds_first_and_last_rank(name, vocabulary, converted, tmp_path):
    tp_size, storage = SHARDED_AND_BUILT[name]
    spec = replace(ARCHITECTURES[name], num_layers=1)
    checkpoint = converted(spec, tp_size, storage)
    make_networks(checkpoint, tmp_path, VOCABULARIES[vocabulary])
    count = len(expected_meetings(spec, VOCABULARIES[vocabulary]))
    for rank in (0, tp_size - 1):
        network = tmp_path / f"rank{rank}.onnx"
        assert parsed_collectives(network) == [tp_size] * count
        build(network, tmp_path / f"rank{rank}.engine")


@pytest.mark.parametrize("name", ["qk_ln, biases", "qk_ln, multi-query", "8 heads, 2 K/V"])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_tensorrt_builds_other_architectures(name, storage, converted, tmp_path):
    spec = replace(ARCHITECTURES[name], num_layers=1)
    make_networks(converted(spec, 4, storage), tmp_path, VocabularySharding())
    network = tmp_path / "rank3.onnx"
    assert parsed_collectives(network) == [4] * len(expected_meetings(spec, VocabularySharding()))
    build(network, tmp_path / "rank3.engine")


def build(network: Path, target: Path) -> None:
    options = BuildOptions(installed_package("tensorrt_rtx"), LIMITS, COMPUTE_CAPABILITIES)
    plan_builder.build_plan(network, options, target)
    assert target.stat().st_size > 1000


# --- engine directories --------------------------------------------------------------------------


SPEC = CheckpointSpec(num_layers=1)
SPLIT_MATRICES = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)


@pytest.fixture(scope="module")
def engine(converted, tmp_path_factory) -> Path:
    """An engine directory of two ranks, made by one command; not to be changed."""
    folder = tmp_path_factory.mktemp("engine") / "engine"
    made = run_tool(
        "build.py",
        f"--model_dir={converted(SPEC, 2).folder}",
        "--world_size=2",
        "--parallel_build",
        *LIMIT_FLAGS,
        "--backend=tensorrt_rtx",
        "--compute_capabilities=8.6",
        f"--output_dir={folder}",
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.split() == [str(folder)]
    return folder


def test_engine_of_two_ranks_says_what_it_is(engine: Path, converted):
    content = json.loads((engine / "config.json").read_text())
    ranks = content.pop("ranks")
    checkpoint = converted(SPEC, 2)
    assert content.pop("config") == vars(checkpoint.config)
    version = installed_package("tensorrt_rtx").version
    assert content == {
        "format": 3,
        "mpt_trt_version": mpt_trt.__version__,
        "model_name": "test-model",
        "dtype": "float32",
        "quantization": {"method": "none"},
        "kv_cache": "auto",
        "head": "auto",
        "calibration": None,
        "tp_size": 2,
        "limits": vars(LIMITS),
        "vocabulary": {"embedding": False, "head": True},
        "provenance": {"folder": "somewhere"},
        "end_ids": [0],
        "ignored_end_ids": {},
        "builder": {
            "package": "tensorrt_rtx",
            "version": version,
            "compute_capabilities": ["8.6"],
        },
    }
    assert [rank["network"] for rank in ranks] == ["rank0.onnx", "rank1.onnx"]
    assert [rank["engine"] for rank in ranks] == ["rank0.engine", "rank1.engine"]


def test_each_rank_lists_its_files_and_no_others(engine: Path):
    ranks = json.loads((engine / "config.json").read_text())["ranks"]
    for rank, described in enumerate(ranks):
        own = {f"rank{rank}.onnx", f"rank{rank}.engine"}
        files = set(described["files"])
        assert own <= files
        assert {name for name in files if name.endswith(f".{rank}.bin")} == {
            f"weights/model.layers.0.{name}.weight.{rank}.bin" for name in SPLIT_MATRICES
        }
        assert not [name for name in files if name.endswith(f".{1 - rank}.bin")]
        for name, record in described["files"].items():
            content = (engine / name).read_bytes()
            digest = f"xxh3:{xxhash.xxh3_128_hexdigest(content)}"
            assert record == {"bytes": len(content), "hash": digest}
    listed = {name for described in ranks for name in described["files"]}
    assert set(tree(engine)) == listed | {"config.json", "weights"}


def test_engine_of_two_ranks_reads_back(engine: Path):
    manifest = read_manifest(engine)
    assert manifest.spec.tp_size == 2
    for rank, files in enumerate(manifest.ranks):
        for name in files.files:
            check_content(engine, files, name)
        assert files.network == f"rank{rank}.onnx"


@pytest.fixture(scope="module")
def parts(converted, tmp_path_factory) -> Path:
    """`network{rank}` and `plan{rank}` of two ranks; not to be changed."""
    folder = tmp_path_factory.mktemp("parts")
    make_parts(converted(SPEC, 2), folder)
    return folder


def make_parts(checkpoint: FtCheckpoint, folder: Path, ranks=(0, 1), **changes) -> None:
    limits = changes.get("limits", LIMITS)
    vocabulary = changes.get("vocabulary", VocabularySharding())
    for rank in ranks:
        part = Rank(rank, checkpoint.tp_size)
        inputs = NetworkInputs(checkpoint, limits, vocabulary)
        make_rank_network(inputs, part, folder / f"network{rank}")
        build_rank(folder / f"network{rank}", rank, BUILDER, folder / f"plan{rank}")


def collected(networks: list[Path], plans: list[Path], target: Path) -> Path:
    assemble_engine(list(zip(networks, plans, strict=True)), target)
    return target


def test_collected_ranks_are_what_the_one_command_makes(parts: Path, engine: Path, tmp_path):
    networks = [parts / "network0", parts / "network1"]
    plans = [parts / "plan0", parts / "plan1"]
    together = collected(networks, plans, tmp_path / "together")
    assert tree(together) == tree(engine)
    contents = [json.loads((folder / "config.json").read_text()) for folder in (together, engine)]
    for content in contents:  # a plan is not the same in every build
        for rank, described in enumerate(content["ranks"]):
            described["files"].pop(f"rank{rank}.engine")
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"limits": replace(LIMITS, max_output_len=8)}, "limits"),
        ({"vocabulary": VocabularySharding(embedding=True)}, "vocabulary"),
    ],
)
def test_a_rank_of_another_build_is_refused(changes, differing, parts, converted, tmp_path):
    make_parts(converted(SPEC, 2), tmp_path / "other", ranks=[1], **changes)
    networks = [parts / "network0", tmp_path / "other" / "network1"]
    plans = [parts / "plan0", tmp_path / "other" / "plan1"]
    message = f"rank 1 and rank 0 differ in {differing}; build all ranks again"
    with pytest.raises(MptTrtError, match=f"^{message}$"):
        collected(networks, plans, tmp_path / "together")
    assert not (tmp_path / "together").exists()


def test_a_rank_of_other_weights_is_refused(parts, converted, tmp_path):
    make_parts(converted(replace(SPEC, seed=1), 2), tmp_path / "other", ranks=[1])
    networks = [parts / "network0", tmp_path / "other" / "network1"]
    plans = [parts / "plan0", tmp_path / "other" / "plan1"]
    with pytest.raises(MptTrtError, match="rank 1 and rank 0 were made from different weights/mod"):
        collected(networks, plans, tmp_path / "together")
    assert not (tmp_path / "together").exists()


def test_a_plan_of_another_network_is_refused(parts, converted, tmp_path):
    longer = replace(LIMITS, max_output_len=8)
    make_parts(converted(SPEC, 2), tmp_path / "other", ranks=[1], limits=longer)
    networks = [parts / "network0", parts / "network1"]
    plans = [parts / "plan0", tmp_path / "other" / "plan1"]
    with pytest.raises(MptTrtError, match=r"rank1\.engine was built from another network than"):
        collected(networks, plans, tmp_path / "together")


def test_half_of_the_ranks_are_refused(parts, tmp_path):
    with pytest.raises(MptTrtError, match="1 ranks given, but 2 are needed"):
        collected([parts / "network0"], [parts / "plan0"], tmp_path / "together")


def test_ranks_in_the_wrong_order_name_the_missing_file(parts, tmp_path):
    networks = [parts / "network1", parts / "network0"]
    plans = [parts / "plan1", parts / "plan0"]
    with pytest.raises(MptTrtError, match=r"plan1/rank0\.engine: no such file"):
        collected(networks, plans, tmp_path / "together")


def test_network_of_another_build_and_the_same_size_is_named(engine, converted, tmp_path):
    copy = Path(shutil.copytree(engine, tmp_path / "engine"))
    shorter = replace(LIMITS, max_output_len=15)
    inputs = NetworkInputs(converted(SPEC, 2), shorter, VocabularySharding())
    make_rank_network(inputs, Rank(1, 2), tmp_path / "other")
    other = tmp_path / "other" / "rank1.onnx"
    assert other.read_bytes() != (copy / "rank1.onnx").read_bytes()
    shutil.copyfile(other, copy / "rank1.onnx")
    manifest = read_manifest(copy)  # the size is right
    with pytest.raises(MptTrtError) as caught:
        check_content(copy, manifest.ranks[1], "rank1.onnx")
    assert str(caught.value) == (
        f"{copy / 'rank1.onnx'}: not the file that config.json describes, but damaged or "
        f"of another build; delete {copy} and build the engine again"
    )


@pytest.mark.parametrize("suffix", [".onnx", ".engine", None])
def test_swapped_files_of_two_ranks_are_named(engine: Path, suffix: str | None, tmp_path: Path):
    """suffix: of their networks or plans; None for the weights, which are equally large."""
    copy = Path(shutil.copytree(engine, tmp_path / "engine"))
    names = [f"rank{rank}{suffix}" for rank in (0, 1)]
    if suffix is None:
        matrix = "weights/model.layers.0.attention.dense.weight"
        names = [f"{matrix}.{rank}.bin" for rank in (0, 1)]
    first, second = (copy / name for name in names)
    assert first.read_bytes() != second.read_bytes()
    first.rename(copy / "first")
    second.rename(first)
    (copy / "first").rename(second)
    with pytest.raises(MptTrtError) as caught:
        manifest = read_manifest(copy)
        check_content(copy, manifest.ranks[1], names[1])
    # Plans differ in size, which is noticed first.
    reasons = r"has \d+ bytes, but|not the file that config\.json describes"
    assert re.search(reasons, str(caught.value))
    assert "build the engine again" in str(caught.value)


@pytest.mark.parametrize(
    "file", ["rank1.onnx", "rank1.engine", "weights/model.layers.0.attention.dense.weight.1.bin"]
)
def test_missing_or_cut_file_of_another_rank_is_named(engine, file, tmp_path):
    """Every rank reads the whole of config.json, so rank 0 notices too."""
    copy = Path(shutil.copytree(engine, tmp_path / "engine"))
    size = (copy / file).stat().st_size
    (copy / file).write_bytes(bytes(size - 1))
    with pytest.raises(MptTrtError, match=f"{re.escape(file)}: has {size - 1} bytes, but"):
        read_manifest(copy)
    (copy / file).unlink()
    with pytest.raises(MptTrtError, match=f"{re.escape(file)}: missing"):
        read_manifest(copy)


# --- refusals before any work --------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 4])
def test_world_size_must_be_that_of_the_checkpoint(world_size, converted, tmp_path):
    folder = converted(SPEC, 2).folder
    with pytest.raises(MptTrtError) as caught:
        call_tool(
            "build.py",
            f"--model_dir={folder}",
            f"--world_size={world_size}",
            f"--output_dir={tmp_path / 'engine'}",
        )
    assert str(caught.value) == (
        f"--world_size = {world_size}, but {folder} was converted for 2; "
        f"give --world_size 2, or convert with -tp {world_size}"
    )
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("spec", "tp_size", "legal"),
    [
        (CheckpointSpec(num_heads=4), 3, "1, 2, 4"),
        (CheckpointSpec(num_heads=12, num_kv_heads=4), 6, "1, 2, 4, 12"),
        (CheckpointSpec(hidden_size=96, num_heads=24, num_kv_heads=8), 16, "1, 2, 4, 8, 24"),
        (CheckpointSpec(hidden_size=42, num_heads=6, expansion_ratio=1.5), 2, "1, 3"),
    ],
)
def test_illegal_number_of_ranks_is_refused_before_weights_are_read(
    spec, tp_size, legal, tmp_path, capsys
):
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config_dict(spec)))  # and no weights
    arguments = ("-i", source, "-o", tmp_path / "ft", "-tp", tp_size)
    with pytest.raises(MptTrtError) as caught:
        call_tool("convert_hf_mpt_to_ft.py", *arguments)
    assert str(caught.value).startswith(f"tensor-parallel size {tp_size} does not divide")
    assert str(caught.value).endswith(f"; valid sizes are {legal}")
    assert tree(tmp_path) == ["hf", "hf/config.json"]


def test_illegal_number_of_ranks_is_one_line(tmp_path):
    source = write_checkpoint(tmp_path / "hf", CheckpointSpec(num_heads=4))
    found = run_tool("convert_hf_mpt_to_ft.py", "-i", source, "-o", tmp_path / "ft", "-tp", 3)
    assert one_line_error(found).endswith("valid sizes are 1, 2, 4")
    assert not (tmp_path / "ft").exists()
