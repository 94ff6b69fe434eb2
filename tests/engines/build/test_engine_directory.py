"""Engine directories: content of `config.json`, assembly, checks and opening."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import xxhash

import mpt_trt
from mpt_trt.engines import load
from mpt_trt.engines.build.assemble import assemble_engine, write_manifest
from mpt_trt.engines.build.build import build_rank
from mpt_trt.engines.load import load_engine, tensorrt_obstacle
from mpt_trt.engines.manifest import Manifest, read_manifest
from mpt_trt.engines.spec import BuilderChoice, BuildLimits
from mpt_trt.engines.tensorrt import packages
from mpt_trt.engines.tensorrt.packages import Package
from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpus
from support.built import Built
from support.checkpoints import CheckpointSpec
from support.engines import (
    COMPUTE_CAPABILITIES,
    LIMITS,
    build,
    call_tool,
    deviation,
    feed,
    make_ft_checkpoint,
    make_network,
    one_line_error,
    random_ids,
    reference,
    run_tool,
    start_tool,
    tree,
)

BUILDER = BuilderChoice("tensorrt_rtx", COMPUTE_CAPABILITIES)
BUILDER_VERSION = metadata.version("tensorrt_rtx_cu13")
WEIGHT = "weights/model.layers.1.mlp.dense_4h_to_h.weight.0.bin"
LIMIT_FLAGS = ("--max_batch_size=4", "--max_input_len=16", "--max_output_len=16")


@pytest.fixture
def no_gpu(monkeypatch):
    """Simulates a machine without an NVIDIA GPU."""
    monkeypatch.setattr(gpus, "compute_capabilities", lambda: ())


@pytest.fixture
def engine(built: Built, tmp_path) -> Path:
    """A copy of the session's engine directory that may be damaged."""
    return Path(shutil.copytree(built.engine, tmp_path / "engine"))


def config_of(engine: Path) -> dict[str, Any]:
    return json.loads((engine / "config.json").read_text())


def xxh3(path: Path) -> str:
    return f"xxh3:{xxhash.xxh3_128_hexdigest(path.read_bytes())}"


# --- config.json ---------------------------------------------------------------------------------


def test_config_says_what_it_is_from_what_by_what_for_what(built: Built):
    content = config_of(built.engine)
    ranks = content.pop("ranks")
    assert content == {
        "format": 3,
        "mpt_trt_version": mpt_trt.__version__,
        "model_name": "test-model",
        "config": {
            "hidden_size": 48,
            "num_heads": 6,
            "num_kv_heads": 6,
            "num_layers": 2,
            "intermediate_size": 192,
            "vocab_size": 97,
            "max_seq_len": 64,
            "softmax_scale": 1 / 8**0.5,
            "position_embedding": "alibi",
            "rope": None,
            "alibi_bias_max": 8,
            "clip_qkv": None,
            "qk_ln": False,
            "logit_scale": 1.0,
            "norm_type": "layernorm",
            "layer_norm_epsilon": 1e-5,
            "qk_ln_epsilon": 1e-5,
            "bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        "dtype": "float32",
        "quantization": {"method": "none"},
        "kv_cache": "auto",
        "calibration": None,
        "tp_size": 1,
        "limits": {
            "max_batch_size": 4,
            "max_input_len": 16,
            "max_output_len": 16,
            "gather_all_token_logits": False,
        },
        "vocabulary": {"embedding": False, "head": True},
        "head": "auto",
        "provenance": {"folder": "somewhere"},
        "end_ids": [0],
        "ignored_end_ids": {},
        "builder": {
            "package": "tensorrt_rtx",
            "version": BUILDER_VERSION,
            "compute_capabilities": ["8.6"],
        },
    }
    assert [sorted(rank) for rank in ranks] == [["engine", "files", "network"]]
    assert (ranks[0]["network"], ranks[0]["engine"]) == ("rank0.onnx", "rank0.engine")


def test_config_has_size_and_hash_of_every_other_file(built: Built):
    recorded = config_of(built.engine)["ranks"][0]["files"]
    files = [p for p in built.engine.rglob("*") if p.is_file() and p.name != "config.json"]
    assert recorded == {
        str(path.relative_to(built.engine)): {"bytes": path.stat().st_size, "hash": xxh3(path)}
        for path in files
    }
    assert len(recorded) == 2 + 2 + 6 * built.spec.num_layers


def test_hashes_are_computed_where_the_checkpoint_has_none(tmp_path):
    """NVIDIA's converter writes no manifest.json."""
    checkpoint = make_ft_checkpoint(tmp_path, CheckpointSpec(num_layers=1))
    (checkpoint.folder / "manifest.json").unlink()
    network = make_network(replace(checkpoint, manifest={}), tmp_path / "network")
    described = json.loads((network / "rank0.network.json").read_text())
    assert described["provenance"] == {}
    assert {name: entry["hash"] for name, entry in described["files"].items()} == {
        str(path.relative_to(network)): xxh3(path)
        for path in (network / "rank0.onnx", *(network / "weights").iterdir())
    }


def test_directory_holds_nothing_else(built: Built):
    top = [name for name in tree(built.engine) if "/" not in name]
    assert top == ["config.json", "rank0.engine", "rank0.onnx", "weights"]


def test_weights_are_the_checkpoints_own_files(built: Built):
    weights = list((built.engine / "weights").iterdir())
    assert len(weights) == 2 + 6 * built.spec.num_layers
    for path in weights:
        assert path.samefile(built.ft / path.name)


def test_manifest_reads_back(built: Built):
    manifest = read_manifest(built.engine)
    assert manifest.spec.config == built.checkpoint.config
    assert manifest.spec.limits == LIMITS
    assert (manifest.spec.dtype, manifest.spec.tp_size) == ("float32", 1)
    assert asdict(manifest.builder) == {
        "package": "tensorrt_rtx",
        "version": BUILDER_VERSION,
        "compute_capabilities": ("8.6",),
    }
    assert manifest.ranks[0].files["rank0.onnx"].hash == xxh3(built.engine / "rank0.onnx")


def test_limits_add_up():
    limits = BuildLimits(max_batch_size=3, max_input_len=10, max_output_len=5)
    assert (limits.cache_len, limits.max_logits) == (15, 3)
    assert replace(limits, gather_all_token_logits=True).max_logits == 30


@pytest.mark.parametrize("field", ["max_batch_size", "max_input_len", "max_output_len"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_below_one_are_refused(field, value):
    with pytest.raises(MptTrtError, match=f"{field} = {value}: at least 1"):
        replace(LIMITS, **{field: value})


# --- damaged directories -------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["rank0.onnx", "rank0.engine", WEIGHT, "weights/model.wte.bin"])
def test_missing_file_is_named(engine, file, no_gpu):
    (engine / file).unlink()
    with pytest.raises(MptTrtError) as caught:
        load_engine(engine)
    assert str(caught.value) == (
        f"{engine / file}: missing, though config.json names it; "
        f"delete {engine} and build the engine again"
    )


@pytest.mark.parametrize("file", ["rank0.onnx", "rank0.engine", WEIGHT])
@pytest.mark.parametrize("change", [-1, 1], ids=["too short", "too long"])
def test_file_of_another_size_is_named(engine, file, change, no_gpu):
    size = (engine / file).stat().st_size
    resize(engine / file, size + change)
    with pytest.raises(MptTrtError) as caught:
        load_engine(engine)
    assert str(caught.value) == (
        f"{engine / file}: has {size + change} bytes, but config.json records {size}; "
        f"delete {engine} and build the engine again"
    )


def resize(path: Path, size: int) -> None:
    with path.open("r+b") as stream:
        stream.truncate(size)


def test_network_of_the_right_size_and_wrong_content(engine, no_gpu):
    size = (engine / "rank0.onnx").stat().st_size
    (engine / "rank0.onnx").write_bytes(b"\xff" * size)
    with pytest.raises(MptTrtError, match=r"rank0\.onnx: not the file that config\.json describes"):
        load_engine(engine)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_flipped_bit_is_noticed_and_trusted_on_request(engine, no_gpu):
    load_engine(engine)
    flip_bit(engine / WEIGHT)
    with pytest.raises(MptTrtError, match=rf"{WEIGHT}: not the file that config\.json describes"):
        load_engine(engine)
    load_engine(engine, is_trusted=True)


def test_swapped_files_of_the_same_size_are_noticed(engine, no_gpu):
    first, second = (engine / WEIGHT.replace("layers.1", f"layers.{i}") for i in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(MptTrtError, match=r"weight\.0\.bin: not the file that config\.json"):
        load_engine(engine)


OUTSIDE = [
    "../secret",
    "/etc/passwd",
    "weights/../../secret",
    "",
    ".",
    "weights//x",
    "a\0b",
    "\ud800",
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("key", ["network", "engine", "files"])
def test_names_in_the_manifest_stay_in_its_folder(engine, name, key):
    (engine.parent / "secret").write_bytes(b"")
    (rank,) = config_of(engine)["ranks"]
    record = {"bytes": 0, "hash": "xxh3:" + "0" * 32}
    rank["files"][name] = record
    if key != "files":
        rank[key] = name
    write_config(engine, ranks=[rank])
    with pytest.raises(
        MptTrtError, match=r"config\.json: damaged .* is not the name of a file in this"
    ):
        read_manifest(engine)


@pytest.mark.parametrize("name", ["rank0.onnx", WEIGHT, "weights"])
def test_links_that_lead_outside_are_not_followed(engine, name):
    outside = engine.parent / "outside"
    (engine / name).rename(outside)
    (engine / name).symlink_to(outside)
    with pytest.raises(MptTrtError, match="a link that leads outside"):
        read_manifest(engine)


def test_an_engine_may_be_a_link_and_links_inside_are_followed(engine, no_gpu):
    (engine / "weights").rename(engine / "real")
    (engine / "weights").symlink_to("real")
    (engine.parent / "link").symlink_to(engine.name)
    load_engine(engine.parent / "link")


@pytest.mark.parametrize("place", ["../secret", "/dev/zero", "weights", "weights/../../secret", ""])
def test_weights_of_a_network_stay_in_its_folder(engine, place, no_gpu):
    (engine.parent / "secret").write_bytes(b"0" * 1_000_000)
    change_graph(engine, "location", place)
    with pytest.raises(MptTrtError, match=r"is not the name of a file|missing, though"):
        load_engine(engine, is_trusted=True)


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "-4"), ("offset", "4"), ("offset", "x"), ("length", "1" * 5000)]
)
def test_weights_of_a_network_stay_in_their_file(engine, key, value, no_gpu):
    change_graph(engine, key, value)
    with pytest.raises(MptTrtError, match=r"rank0\.onnx: damaged \(weight"):
        load_engine(engine, is_trusted=True)


def change_graph(engine: Path, key: str, value: str) -> None:
    """Changes where a weight lies, and the manifest with it."""
    graph = engine / "rank0.onnx"
    model = onnx.load(graph, load_external_data=False)
    tensor = next(each for each in model.graph.initializer if each.external_data)
    place = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
    del tensor.external_data[:]
    for name, content in place.items():
        tensor.external_data.add(key=name, value=content)
    graph.write_bytes(model.SerializeToString())
    (rank,) = config_of(engine)["ranks"]
    rank["files"]["rank0.onnx"] = {"bytes": graph.stat().st_size, "hash": xxh3(graph)}
    write_config(engine, ranks=[rank])


@pytest.mark.parametrize(
    "changes",
    [
        {"tp_size": True},
        {"model_name": 1},
        {"kv_cache": "int4"},
        {"dtype": "float64"},
        {"provenance": []},
        {"calibration": 1},
        {"vocabulary": {"embedding": 1, "head": True}},
        {"quantization": {"method": "int4_weight_only", "group_size": "128"}},
        {"quantization": {"method": "int4_weight_only", "group_size": 3}},
        {"quantization": {"method": ["none"]}},
        {"quantization": {"method": "smoothquant", "alpha": float("nan")}},
        {"builder": {"package": "os", "version": "0", "compute_capabilities": []}},
        {"builder": {"package": "tensorrt", "version": "0", "compute_capabilities": "8.6"}},
        {"limits": {"max_batch_size": 4, "max_input_len": 1, "max_output_len": "limits"}},
    ],
    ids=lambda changes: json.dumps(changes)[:60],
)
def test_values_of_other_types_are_refused(engine, changes):
    write_config(engine, **changes)
    with pytest.raises(MptTrtError, match=rf"config\.json: damaged .*{next(iter(changes))}"):
        read_manifest(engine)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10_000_000},
        {"num_layers": "2"},
        {"num_heads": 0},
        {"num_heads": 5},
        {"hidden_size": 1e3},
        {"softmax_scale": None},
        {"layer_norm_epsilon": float("inf")},
        {"position_embedding": "rope"},
        {"bias": 0},
    ],
    ids=json.dumps,
)
def test_sizes_and_types_of_the_architecture_are_checked(engine, change):
    write_config(engine, config=config_of(engine)["config"] | change)
    with pytest.raises(MptTrtError, match=rf"config\.json: damaged .*{next(iter(change))}"):
        read_manifest(engine)


@pytest.mark.parametrize("number", [0, 1, 99, None, "2"])
def test_other_format_numbers_are_refused(engine, number):
    write_config(engine, format=number)
    with pytest.raises(MptTrtError) as caught:
        read_manifest(engine)
    assert f"{engine / 'config.json'}: format = {number!r}" in str(caught.value)
    assert "reads engine directories of format 3" in str(caught.value)


def write_config(engine: Path, **changes: object) -> None:
    content = config_of(engine) | changes
    (engine / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "key", ["model_name", "config", "dtype", "tp_size", "limits", "provenance", "builder", "ranks"]
)
def test_missing_key_is_named(engine, key):
    content = config_of(engine)
    del content[key]
    (engine / "config.json").write_text(json.dumps(content))
    with pytest.raises(MptTrtError, match=rf"config\.json: damaged .*{key}"):
        read_manifest(engine)


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks": []},
        {"ranks": "none"},
        {"ranks": [1]},
        {"tp_size": 2},
        {"limits": {"max_batch_size": 4}},
        {"limits": {"max_batch_size": "4", "max_input_len": 16, "max_output_len": 16}},
        {"builder": []},
        {"builder": "tensorrt_rtx"},
        {"config": None},
        {"config": {"heads": 4}},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_nonsense_is_refused(engine, changes):
    write_config(engine, **changes)
    with pytest.raises(MptTrtError, match=r"config\.json: damaged .*build the engine again"):
        read_manifest(engine)


@pytest.mark.parametrize("text", ["", '{"format": 3, "mod', "[]", "\x00"])
def test_broken_json_is_refused(engine, text):
    (engine / "config.json").write_text(text)
    with pytest.raises(MptTrtError, match=r"config\.json: .*JSON"):
        read_manifest(engine)


def test_folder_that_is_no_engine_directory(tmp_path):
    with pytest.raises(MptTrtError, match=r"config\.json: no such file"):
        read_manifest(tmp_path)


# --- putting ranks together ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(built: Built, tmp_path_factory) -> Path:
    """`network` and `plan` of the session's model, and `longer_network` with other limits."""
    folder = tmp_path_factory.mktemp("parts")
    network = make_network(built.checkpoint, folder / "network")
    make_network(built.checkpoint, folder / "longer_network", replace(LIMITS, max_output_len=17))
    build_rank(network, 0, BUILDER, folder / "plan")
    return folder


def test_collected_directory_is_what_build_makes(built: Built, parts, tmp_path):
    assemble_engine([(parts / "network", parts / "plan")], tmp_path / "engine")
    assert tree(tmp_path / "engine") == tree(built.engine)
    collected, whole = config_of(tmp_path / "engine"), config_of(built.engine)
    for content in (collected, whole):  # a plan is not the same in every build
        content["ranks"][0]["files"].pop("rank0.engine")
    assert collected == whole
    for file in ("rank0.engine", "rank0.onnx", WEIGHT):
        source = parts / ("plan" if file == "rank0.engine" else "network") / file
        assert (tmp_path / "engine" / file).samefile(source)
    read_manifest(tmp_path / "engine")


def test_plan_of_another_network_is_refused(parts, tmp_path):
    with pytest.raises(MptTrtError) as caught:
        assemble_engine([(parts / "longer_network", parts / "plan")], tmp_path / "engine")
    assert str(caught.value) == (
        "rank0.engine was built from another network than the rank0.onnx given; build it again"
    )
    assert tree(tmp_path) == []


def test_network_made_again_in_the_same_way_still_fits(built: Built, parts, tmp_path):
    again = make_network(built.checkpoint, tmp_path / "again")
    assemble_engine([(again, parts / "plan")], tmp_path / "engine")
    read_manifest(tmp_path / "engine")


def test_more_ranks_than_the_model_has_are_refused(parts, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    for folder in ("network", "plan"):
        shutil.copytree(parts / folder, second / folder)
    for path in list(second.glob("*/rank0.*")):
        path.rename(path.with_name(path.name.replace("rank0", "rank1")))
    ranks = [(parts / "network", parts / "plan"), (second / "network", second / "plan")]
    with pytest.raises(MptTrtError):
        assemble_engine(ranks, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_ranks_of_different_builders_are_refused(parts, tmp_path):
    for rank in (0, 1):
        for part in ("network", "engine"):
            source = parts / ("network" if part == "network" else "plan") / f"rank0.{part}.json"
            content = json.loads(source.read_text()) | {"tp_size": 2}
            if (rank, part) == (1, "engine"):
                content["builder"] = content["builder"] | {"version": "0.1"}
            (tmp_path / f"rank{rank}.{part}.json").write_text(json.dumps(content))
    with pytest.raises(MptTrtError, match="rank 1 and rank 0 differ in builder; build all ranks"):
        write_manifest(tmp_path, [(tmp_path, tmp_path)] * 2)


@pytest.mark.parametrize(
    "removed", ["network/rank0.onnx", "plan/rank0.engine", f"network/{WEIGHT}"]
)
@pytest.mark.parametrize("is_cut", [True, False])
def test_collecting_an_incomplete_rank_names_the_file(parts, removed, is_cut, tmp_path):
    copy = Path(shutil.copytree(parts, tmp_path / "parts"))
    is_plan = removed.startswith("plan/")
    description = "rank0.engine.json" if is_plan else "rank0.network.json"
    remedy = f"delete {copy / 'network'} and make the networks again"
    size = (copy / removed).stat().st_size
    if is_cut:
        resize(copy / removed, size - 1)
        message = f"has {size - 1} bytes, but {description} records {size}; "
        message += f"delete {copy / removed} and build it again" if is_plan else remedy
    else:
        (copy / removed).unlink()
        message = f"missing, though {description} names it; {remedy}"
        message = "no such file; build it again" if is_plan else message
    with pytest.raises(MptTrtError) as caught:
        assemble_engine([(copy / "network", copy / "plan")], tmp_path / "engine")
    assert str(caught.value) == f"{copy / removed}: {message}"
    assert not (tmp_path / "engine").exists() and not list(tmp_path.glob(".engine*"))


def test_a_build_killed_between_description_and_plan_is_noticed_and_repaired(parts, tmp_path):
    copy = Path(shutil.copytree(parts, tmp_path / "parts"))
    networks, plans = copy / "network", copy / "plan"
    build_rank(networks, 0, BuilderChoice("tensorrt_rtx", ("8.9",)), copy / "other")
    shutil.copyfile(copy / "other/rank0.engine.json", plans / "rank0.engine.json")
    with pytest.raises(
        MptTrtError, match=rf"^{plans}/rank0\.engine: .*; delete .* and build it ag"
    ):
        assemble_engine([(networks, plans)], tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    build_rank(networks, 0, BUILDER, plans)
    assemble_engine([(networks, plans)], tmp_path / "engine")
    read_manifest(tmp_path / "engine")


def test_step_by_step_tools_make_an_engine_directory(built: Built, tmp_path):
    network, plan, engine = (tmp_path / name for name in ("network", "plan", "engine"))
    options = (f"--model_dir={built.ft}", *LIMIT_FLAGS, f"--output_dir={network}")
    call_tool("make_networks.py", *options)
    # Twice at once, as from two working copies.
    options = (f"--network_dir={network}", f"--output_dir={plan}")
    both = [start_tool("build_rank.py", *options) for _ in range(2)]
    for process in both:
        assert process.communicate()[1] is not None and process.returncode == 0
    assert tree(plan) == ["rank0.engine", "rank0.engine.json"]
    folders = ("--network_dir", network, "--plan_dir", plan, "--output_dir", engine)
    call_tool("assemble_engine.py", *folders)
    manifest = read_manifest(engine)
    assert manifest.spec.limits == LIMITS
    assert manifest.builder.compute_capabilities == ("8.0", "8.6", "8.9", "12.0")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("make_networks.py", ("--model_dir={ft}", "--max_input_len=0"), "max_input_len = 0: at le"),
        ("build_rank.py", ("--network_dir={ft}",), r"rank0\.network\.json: no such file"),
        ("assemble_engine.py", ("--network_dir", "a", "--plan_dir", "b"), "no such file"),
    ],
)
def test_step_by_step_tools_refuse(built: Built, script, arguments, message, tmp_path):
    filled = [argument.format(ft=built.ft) for argument in arguments]
    with pytest.raises(MptTrtError, match=message):
        call_tool(script, *filled, f"--output_dir={tmp_path / 'out'}")
    assert tree(tmp_path) == []


# --- opening -------------------------------------------------------------------------------------


def test_without_a_gpu_onnx_runtime_stands_in_and_says_so(built: Built, no_gpu):
    loaded = load_engine(built.engine, num_threads=1)
    assert loaded.fallback_reason == ("no NVIDIA GPU found; the plan is for compute capability 8.6")
    assert (
        loaded.runtime == f"ONNX Runtime {metadata.version('onnxruntime')} (CPUExecutionProvider)"
    )
    assert loaded.max_logits is None
    ids = random_ids(built.spec, rows=2, length=9)
    assert deviation(feed(loaded.model, ids, [7, 1, 1]), reference(built.spec, ids)) < 2e-5


def test_onnx_runtime_on_request(built: Built):
    assert load_engine(built.engine, "onnxruntime").fallback_reason == "ONNX Runtime was requested"


def test_tensorrt_on_request_fails_where_it_cannot_run(built: Built, no_gpu):
    with pytest.raises(MptTrtError) as caught:
        load_engine(built.engine, "tensorrt")
    assert str(caught.value) == (
        f"{built.engine}: TensorRT cannot run this engine here: no NVIDIA GPU found; "
        "the plan is for compute capability 8.6"
    )


def test_bfloat16_engine_says_in_which_arithmetic_it_ran(tmp_path, no_gpu):
    checkpoint = make_ft_checkpoint(tmp_path, CheckpointSpec(num_layers=1), "bfloat16")
    loaded = load_engine(build(checkpoint, tmp_path / "engine"))
    assert loaded.runtime.endswith("(CPUExecutionProvider, float32 arithmetic)")


def test_rows_beyond_max_batch_size_are_refused(built: Built, no_gpu):
    loaded = load_engine(built.engine)
    loaded.model.start(4)
    with pytest.raises(MptTrtError, match=r"5 rows are requested, .* max_batch_size = 4"):
        loaded.model.start(5)


@pytest.fixture
def manifest(built: Built) -> Manifest:
    return read_manifest(built.engine)


def on_machine(
    monkeypatch, capabilities: tuple[str, ...], package: Package | None, memory: int = 80 * 10**9
) -> None:
    monkeypatch.setattr(gpus, "compute_capabilities", lambda: capabilities)
    monkeypatch.setattr(gpus, "memory_sizes", lambda: (memory,) * len(capabilities))
    monkeypatch.setattr(load, "installed_package", lambda module: package)


SAME_BUILDER = Package("tensorrt_rtx", BUILDER_VERSION)


def test_nothing_speaks_against_the_right_gpu_and_version(manifest, monkeypatch):
    on_machine(monkeypatch, ("8.6", "9.0"), SAME_BUILDER)
    assert tensorrt_obstacle(manifest) is None


@pytest.mark.parametrize(
    ("capabilities", "package", "obstacle"),
    [
        ((), SAME_BUILDER, "no NVIDIA GPU found; the plan is for compute capability 8.6"),
        (
            ("9.0",),
            SAME_BUILDER,
            "this GPU has compute capability 9.0, the plan is for 8.6; add it to "
            "compute_capabilities or build here",
        ),
        (("8.6",), None, f"tensorrt_rtx {BUILDER_VERSION} is not installed"),
        (
            ("8.6",),
            Package("tensorrt_rtx", "9.9.9"),
            f"the plan was built by tensorrt_rtx {BUILDER_VERSION}, installed is 9.9.9; "
            "build the engine again",
        ),
    ],
    ids=["no GPU", "another GPU", "no builder", "another version"],
)
def test_obstacles_to_running_the_plan(manifest, capabilities, package, obstacle, monkeypatch):
    on_machine(monkeypatch, capabilities, package)
    assert tensorrt_obstacle(manifest) == obstacle


def test_a_gpu_that_is_too_small_is_told_what_is_needed(manifest, monkeypatch):
    on_machine(monkeypatch, ("8.6",), SAME_BUILDER, memory=1000)
    assert tensorrt_obstacle(manifest).endswith("this needs 1 GPU of 16 GB")


def test_upgraded_builder_makes_onnx_runtime_stand_in(built: Built, monkeypatch):
    on_machine(monkeypatch, ("8.6",), Package("tensorrt_rtx", "9.9.9"))
    loaded = load_engine(built.engine, num_threads=1)
    assert "9.9.9; build the engine again" in loaded.fallback_reason


# --- choosing the builder ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "gpu", "installed", "chosen"),
    [
        ("auto", (), {"tensorrt", "tensorrt_rtx"}, "tensorrt_rtx"),
        ("auto", ("8.0",), {"tensorrt", "tensorrt_rtx"}, "tensorrt"),
        ("auto", ("8.0",), {"tensorrt_rtx"}, "tensorrt_rtx"),
        ("tensorrt_rtx", ("8.0",), {"tensorrt", "tensorrt_rtx"}, "tensorrt_rtx"),
        ("tensorrt", ("8.0",), {"tensorrt_rtx"}, None),
        ("auto", (), {"tensorrt"}, None),
    ],
)
def test_builder_is_chosen_by_gpu_and_installation(backend, gpu, installed, chosen, monkeypatch):
    def found(module: str) -> Package | None:
        return Package(module, "1.2") if module in installed else None

    monkeypatch.setattr(gpus, "compute_capabilities", lambda: gpu)
    monkeypatch.setattr(packages, "installed_package", found)
    if chosen is None:
        with pytest.raises(
            MptTrtError,
            match=rf"backend = {backend}: .* is not installed; pip install -r requirements\.txt",
        ):
            packages.choose_package(backend)
    else:
        assert packages.choose_package(backend) == Package(chosen, "1.2")


def test_installed_builder_is_found_by_its_module():
    assert packages.installed_package("tensorrt_rtx") == SAME_BUILDER


# --- build.py ------------------------------------------------------------------------------------

REFERENCE_SPELLINGS = {
    "single GPU": [
        *("--max_batch_size", "64", "--use_gpt_attention_plugin", "--use_gemm_plugin"),
    ],
    "several plugins": [
        *("--world_size=1", "--parallel_build", "--max_batch_size", "64"),
        *("--max_input_len", "12", "--max_output_len", "7"),
        *("--use_gpt_attention_plugin", "--use_gemm_plugin"),
    ],
    "all, with types": [
        *("--max_batch_size", "64", "--remove_input_padding", "--enable_context_fmha"),
        *("--use_gpt_attention_plugin", "float16", "--use_gemm_plugin", "float16"),
        *("--dtype", "float32", "--log_level", "warning"),
    ],
}


@pytest.mark.parametrize("spelling", REFERENCE_SPELLINGS)
def test_commands_of_the_reference_document(built: Built, spelling, tmp_path, capsys):
    arguments = REFERENCE_SPELLINGS[spelling]
    call_tool(
        "build.py", f"--model_dir={built.ft}", *arguments, "--output_dir", tmp_path / "engine"
    )
    limits = read_manifest(tmp_path / "engine").spec.limits
    is_given = "--max_input_len" in arguments
    assert limits == BuildLimits(64, 12 if is_given else 512, 7 if is_given else 64)
    flags = {a.partition("=")[0] for a in arguments if a.startswith("--")}
    with_effect = {f"--{name}" for name in asdict(LIMITS)} | {
        *("--world_size", "--dtype", "--log_level", "--parallel_build")
    }
    message = " ".join(capsys.readouterr().err.split())
    if "--log_level" in arguments:
        assert "Without effect" not in message
    else:
        listed = re.search(r"Without effect here:((?: --\w+)+)", message)[1].split()
        assert set(listed) == flags - with_effect


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world_size=2"], r"was converted for 1; give --world_size 1, or convert with -tp 2"),
        (["--dtype=float16"], r"--dtype = float16, but .* is stored in float32; .* -t float16"),
        (["--max_batch_size=0"], "--max_batch_size = 0: at least 1 is required"),
        (["--max_input_len=-5"], "--max_input_len = -5: at least 1 is required"),
        (["--max_output_len=0"], "max_output_len = 0: at least 1 is required"),
        (["--log_level=loud"], "log level 'loud': known are debug, info"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_build_refuses(built: Built, arguments, message, tmp_path):
    with pytest.raises(MptTrtError, match=message):
        call_tool(
            "build.py", f"--model_dir={built.ft}", f"--output_dir={tmp_path / 'x'}", *arguments
        )
    assert tree(tmp_path) == []


def test_build_without_a_checkpoint(tmp_path):
    result = run_tool("build.py", f"--model_dir={tmp_path}", f"--output_dir={tmp_path / 'x'}")
    assert "config.ini: no such file; give a {tp_size}-gpu folder" in one_line_error(result)


def test_all_limits_reach_the_engine(built: Built, tmp_path):
    call_tool(
        "build.py",
        f"--model_dir={built.ft}",
        f"--output_dir={tmp_path / 'engine'}",
        *("--max_batch_size=3", "--max_input_len=10", "--max_output_len=6"),
        "--gather_all_token_logits",
        *("--compute_capabilities", "8.9", "12.0"),
    )
    manifest = read_manifest(tmp_path / "engine")
    assert manifest.spec.limits == BuildLimits(3, 10, 6, gather_all_token_logits=True)
    assert manifest.builder.compute_capabilities == ("8.9", "12.0")


def test_new_build_replaces_the_old_directory_as_a_whole(built: Built, tmp_path):
    engine = build(built.checkpoint, tmp_path / "engine")
    (engine / "notes.txt").write_text("mine")
    with pytest.raises(MptTrtError, match=r"not replaced, because notes\.txt in it is not a file"):
        build(built.checkpoint, engine, replace(LIMITS, max_output_len=20))
    (engine / "notes.txt").unlink()
    build(built.checkpoint, engine, replace(LIMITS, max_output_len=20))
    assert tree(engine) == tree(built.engine)
    assert read_manifest(engine).spec.limits.max_output_len == 20
    assert tree(tmp_path) == ["engine", *(f"engine/{name}" for name in tree(engine))]


def test_engine_outlives_its_checkpoint(tmp_path, no_gpu):
    """Hard links: the FT checkpoint may be deleted, the weights stay."""
    spec = CheckpointSpec(num_layers=1)
    checkpoint = make_ft_checkpoint(tmp_path, spec)
    engine = build(checkpoint, tmp_path / "engine")
    shutil.rmtree(checkpoint.folder)
    ids = random_ids(spec, rows=1, length=4)
    found = feed(load_engine(engine, num_threads=1).model, ids, [4])
    assert np.isfinite(found).all() and deviation(found, reference(spec, ids)) < 2e-5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config.num_layers", 1),
        ("config.num_layers", 3),
        ("config.num_kv_heads", 3),
        ("config.vocab_size", 40),
        ("dtype", "float16"),
        ("kv_cache", "int8"),
        ("limits.max_output_len", 17),
    ],
)
def test_a_description_of_another_network_is_refused(engine: Path, key: str, value, no_gpu):
    content = config_of(engine)
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    place[last] = value
    (engine / "config.json").write_text(json.dumps(content))
    with pytest.raises(MptTrtError, match=r"not the network that config\.json describes|damaged"):
        load_engine(engine, is_trusted=True)
