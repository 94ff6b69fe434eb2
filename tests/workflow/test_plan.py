"""Plans without Snakemake: inputs and options."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.known_models import hub_config, known_config
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.engines.tensorrt import packages
from mpt_trt.errors import MptTrtError
from mpt_trt.quantization.schemes import Quantization, WeightOnly
from mpt_trt.workflow.job_options import JobOptions
from mpt_trt.workflow.plan import Plan, Target
from mpt_trt.workflow.settings import parse_settings
from support.checkpoints import write_checkpoint
from support.plans import LIMITS, SPEC, TOY, make_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the toy model."""
    made = tmp_path_factory.mktemp("plan")
    write_checkpoint(made / "model", SPEC)
    return made


def variants(**quantization: dict) -> dict:
    return {name: {"quantization": entry, **LIMITS} for name, entry in quantization.items()}


def test_targets_are_read_from_wildcards() -> None:
    assert Target.of({"model": "m", "storage": "sq"}) == Target("m", storage="sq")
    found = Target.of({"model": "m", "variant": "1", "tp": "8", "rank": "7"})
    assert found == Target("m", "1", tp=8, rank=7)


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_local_checkpoint_is_its_folder_and_the_files_that_are_read(folder: Path) -> None:
    plan = make_plan(folder)
    first, *files = plan.checkpoint_inputs(TOY)
    assert first == plan.checkpoint_folder(TOY) == "model"
    assert "model/config.json" in files and "model/model.safetensors" in files
    assert plan.stored_config(TOY) == plan.planned_config(TOY) == read_hf_config(folder / "model")


def test_a_hub_model_is_the_folder_that_it_is_fetched_to(folder: Path) -> None:
    plan, seven = make_plan(folder), Target("seven")
    assert plan.is_on_hub(seven) and not plan.is_on_hub(TOY)
    assert plan.checkpoint_inputs(seven) == ["checkpoints/seven"]
    assert (plan.source(seven), plan.revision(seven)) == ("mosaicml/mpt-7b", "v1")
    assert plan.stored_config(seven) is None
    assert plan.planned_config(seven) == known_config("mpt-7b")
    assert plan.planned_config(Target("other")) == known_config("mpt-7b")


def test_a_fetched_model_is_planned_by_its_own_config(tmp_path: Path) -> None:
    plan, other = make_plan(tmp_path), Target("other")
    path = tmp_path / "checkpoints/other/config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(hub_config("mpt-30b")))
    assert plan.planned_config(other) == known_config("mpt-30b")


def test_missing_folders_are_named(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, models={"gone": {"source": "./nowhere"}})
    with pytest.raises(MptTrtError, match=r"no such folder: .*nowhere; models\.gone\.source"):
        plan.checkpoint_inputs(Target("gone"))


@pytest.mark.parametrize(
    ("path", "is_here", "found"),
    [
        ("resources/x", False, "{repository}/resources/x"),
        ("resources/x", True, "resources/x"),
        ("resources/y", False, "resources/y"),
        ("/absolute/x", False, "/absolute/x"),
        ("mosaicml/mpt-7b", False, "mosaicml/mpt-7b"),
        ("~/x", False, "{home}/x"),
        ("~nobody-of-that-name/x", False, "~nobody-of-that-name/x"),
    ],
)
def test_paths_are_looked_for_here_and_then_among_what_ships(
    path: str, is_here: bool, found: str, tmp_path: Path
) -> None:
    repository, folder = tmp_path / "repository", tmp_path / "folder"
    (repository / "resources/x").mkdir(parents=True)
    if is_here:
        (folder / path).mkdir(parents=True)
    expected = found.format(repository=repository, home=Path.home())
    assert make_plan(folder, repository).find(path) == expected


def write_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (folder / name).write_text("{}")
    return folder


def test_an_adapter_is_an_input_of_every_job_that_reads_the_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", SPEC)
    write_adapter(tmp_path / "lora")
    models = {
        "tuned": {"source": "model", "adapter": "lora"},
        "hub": {"source": "owner/name", "adapter": str(tmp_path / "lora")},
    }
    plan = make_plan(tmp_path, models=models)
    files = ["lora/adapter_config.json", "lora/adapter_model.safetensors"]
    assert plan.checkpoint_inputs(Target("tuned")) == [*plan.checkpoint_inputs(TOY), *files]
    first, *others = plan.checkpoint_inputs(Target("hub"))
    assert (first, others) == ("checkpoints/hub", [str(tmp_path / name) for name in files])
    options = JobOptions(plan)
    for found in (
        options.conversion(Target("tuned", storage="fp16")),
        options.smoothquant(Target("tuned", storage="sq")),
        options.quantize(Target("tuned", qformat="fp8")),
        options.reference(Target("tuned")),
        options.smoke_test(Target("tuned", "fp16")),
        options.comparison(Target("tuned", "fp16")),
        options.quality(Target("tuned")),
    ):
        assert found.count("--adapter=lora") == 1
    assert options.tokenizer(Target("tuned")) == []
    assert options.quality(TOY) == [f"--text={plan.quality_text(TOY)}"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, r"models\.tuned\.adapter = lora: no such folder"),
        (lambda folder: (folder / "lora").mkdir(), r"lora: no adapter_config\.json"),
        (
            lambda folder: (write_adapter(folder / "lora") / "adapter_model.safetensors").unlink(),
            r"lora: no tensors of an adapter",
        ),
    ],
)
def test_folders_without_an_adapter_are_named(
    tmp_path: Path, prepare: Callable[[Path], object], message: str
) -> None:
    write_checkpoint(tmp_path / "model", SPEC)
    prepare(tmp_path)
    plan = make_plan(tmp_path, models={"tuned": {"source": "model", "adapter": "lora"}})
    with pytest.raises(MptTrtError, match=message):
        plan.checkpoint_inputs(Target("tuned"))


def test_shipped_models_and_tokenizers_are_found_from_elsewhere(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write_checkpoint(repository / "resources/demo", SPEC)
    models = {
        "demo": {"source": "resources/demo"},
        "own": {"source": "resources/demo", "tokenizer": "resources/demo"},
        "hub": {"source": "resources/demo", "tokenizer": "owner/name"},
    }
    plan = make_plan(tmp_path / "work", repository, models=models)
    shipped = str(repository / "resources/demo")
    first, *files = plan.checkpoint_inputs(Target("demo"))
    assert first == shipped and f"{shipped}/config.json" in files
    assert plan.stored_config(Target("demo")) == read_hf_config(Path(shipped))
    assert plan.tokenizer_folder(Target("demo")) == shipped
    options = {name: JobOptions(plan).reference(Target(name)) for name in models}
    own, hub = (f"--tokenizer_dir={folder}" for folder in (shipped, "owner/name"))
    assert options["own"] == [own, *options["demo"]]
    assert options["hub"] == [hub, *options["demo"]]


def test_an_unreadable_source_does_not_concern_other_models(tmp_path: Path) -> None:
    """Names that are too long fail like folders without permission."""
    (tmp_path / "own").mkdir()
    models = {"own": {"source": "own"}, "other": {"source": f"{'x' * 300}/model"}}
    plan = make_plan(tmp_path, tmp_path / "repository", models=models)
    assert plan.source(Target("own")) == "own"


def test_scripts_are_named_from_the_working_directory(tmp_path: Path) -> None:
    here = Plan(parse_settings({}), tmp_path, tmp_path)
    assert here.script("build.py") == Path("workflow_scripts/build.py")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert Plan(parse_settings({}), link, tmp_path).script("a.py") == Path("workflow_scripts/a.py")
    elsewhere = Plan(parse_settings({}), tmp_path, tmp_path / "work")
    assert elsewhere.script("build.py") == tmp_path / "workflow_scripts/build.py"


@pytest.mark.parametrize(
    ("storage", "storage_type"),
    [("fp32", "float32"), ("bf16", "bfloat16"), ("sq-0.8-bf16", "bfloat16")],
)
def test_names_of_ft_checkpoints(storage: str, storage_type: str) -> None:
    assert make_plan(Path()).storage_type(Target("toy", storage=storage)) == storage_type


# --- engines -------------------------------------------------------------------------------------


def test_the_spec_of_an_engine(folder: Path) -> None:
    plan = make_plan(folder, variants=variants(int4={"method": "int4_weight_only"}))
    spec = plan.engine_spec(Target("toy", "int4", tp=2))
    assert (spec.config, spec.tp_size, spec.dtype) == (plan.stored_config(TOY), 2, "float16")
    assert spec.limits == BuildLimits(4, 24, 16)
    assert spec.quantization == Quantization(WeightOnly(4))
    assert plan.engine_spec(Target("toy", "int4", tp=2)) is spec


def test_an_impossible_number_of_ranks_is_planned_like_one(folder: Path) -> None:
    assert make_plan(folder).engine_spec(Target("toy", "fp16", tp=5)).tp_size == 1


@pytest.mark.parametrize(
    ("quantization", "cache", "ft", "calibration"),
    [
        ({}, "auto", "fp16", None),
        ({}, "int8", "fp16", "kv_cache"),
        ({"method": "smoothquant"}, "auto", "sq", None),
        ({"method": "smoothquant", "alpha": 0.8}, "fp8", "sq-0.8", "kv_cache"),
        ({"method": "int4_awq", "group_size": 64}, "auto", "fp16", "int4_awq-g64"),
        ({"method": "fp8"}, "auto", "fp16", "fp8"),
    ],
)
def test_what_networks_are_made_from(
    quantization: dict, cache: str, ft: str, calibration: str | None
) -> None:
    entry = {"quantization": quantization, "kv_cache_dtype": cache}
    plan, target = make_plan(Path(), variants={"v": entry}), Target("toy", "v", tp=2)
    path = f"quantized/toy/{calibration}/mpt_tp1_rank0.npz"
    assert plan.ft_checkpoint(target) == f"ft_ckpts/toy/{ft}/2-gpu"
    assert plan.calibration(target) == ([] if calibration is None else [path])
    option = [] if calibration is None else [f"--calibration={path}"]
    options = JobOptions(plan).networks(target)
    assert [each for each in options if each.startswith("--calibration=")] == option


@pytest.mark.parametrize(
    ("quantization", "ft", "calibration"),
    [
        ({}, "fp16", None),
        ({"method": "smoothquant"}, "sq", None),
        ({"method": "smoothquant", "per_token": False}, "fp16", "int8_sq"),
        ({"method": "int4_awq"}, "fp16", "int4_awq"),
    ],
)
def test_what_a_trtllm_checkpoint_is_made_from(
    quantization: dict, ft: str, calibration: str | None
) -> None:
    plan, target = make_plan(Path(), variants=variants(v=quantization)), Target("toy", "v", tp=2)
    path = f"quantized/toy/{calibration}/mpt_tp1_rank0.npz"
    assert plan.ft_checkpoint_for_trtllm(target) == f"ft_ckpts/toy/{ft}/2-gpu"
    assert plan.calibration_for_trtllm(target) == ([] if calibration is None else [path])


def test_an_engine_takes_the_plans_of_all_its_ranks() -> None:
    assert make_plan(Path()).plans_of_ranks(Target("toy", "fp16", tp=2)) == [
        "build/plans/toy/fp16/2-gpu/rank0.engine",
        "build/plans/toy/fp16/2-gpu/rank1.engine",
    ]


# --- rules of targets ----------------------------------------------------------------------------


def test_the_backend_decides_about_the_rule(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, variants={"llm": {"backend": "tensorrt_llm"}, "llm2": {}})
    ours, theirs = plan.other_variants(), plan.variants_of_trtllm()
    for name, is_theirs in (("llm", True), ("llm2", False), ("fp16", False), ("unknown", False)):
        path = f"trt_engines/toy/{name}/1-gpu"
        assert bool(re.fullmatch(f"trt_engines/toy/({theirs})/1-gpu", path)) == is_theirs
        assert bool(re.fullmatch(f"trt_engines/toy/({ours})/1-gpu", path)) != is_theirs
    none = make_plan(tmp_path)
    assert re.fullmatch(none.variants_of_trtllm(), "") is None
    assert re.fullmatch(f"x/({none.other_variants()})/1", "x/fp16/1")


def test_results_that_a_report_shows() -> None:
    plan = make_plan(Path(), report={"variants": ["fp16"], "more_tp_sizes": {"fp16": [2]}})
    assert plan.variants_of_report(Target("toy")) == ["fp16", "fp16"]
    assert plan.quality_of_report(Target("toy")) == [
        "quality/toy/fp16/1-gpu.json",
        "quality/toy/fp16/2-gpu.json",
    ]
    assert plan.smoke_tests_of_report(Target("toy"))[1] == "build/smoke_tests/toy/fp16/2-gpu.json"


# --- files and builders --------------------------------------------------------------------------


def test_task_files_are_inputs_of_quality(tmp_path: Path) -> None:
    (tmp_path / "tasks/more").mkdir(parents=True)
    for name in ("tasks/t.yaml", "tasks/more/data.jsonl", "tasks/.hidden"):
        (tmp_path / name).touch()

    def inputs(**quality: object) -> list[str]:
        return make_plan(tmp_path, quality=quality).task_files(TOY)

    assert inputs(tasks=["t"], task_dir="tasks") == ["tasks/t.yaml", "tasks/more/data.jsonl"]
    assert inputs(task_dir="tasks") == inputs(tasks=["t"]) == []
    with pytest.raises(MptTrtError, match=r"^quality\.task_dir = nowhere: no such folder"):
        inputs(tasks=["t"], task_dir="nowhere")
    with pytest.raises(MptTrtError, match=r"^quality\.task_dir = \.: .* the workflow's outputs"):
        inputs(tasks=["t"], task_dir=".")


def test_a_builder_that_is_not_there_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "installed_package", lambda module: None)
    with pytest.raises(MptTrtError, match="backend = auto"):
        make_plan(folder).builder(TOY)
    plan = make_plan(folder, variants={"llm": {"backend": "tensorrt_llm"}})
    with pytest.raises(MptTrtError, match="it builds whole engines"):
        plan.builder(Target("toy", "llm"))


@pytest.mark.parametrize("path", ["mo{d}el", "{ a }/b", "x/{a,.*}", "{ü}"])
def test_paths_that_snakemake_cannot_have_as_inputs(tmp_path: Path, path: str) -> None:
    plan = Plan(parse_settings({}), tmp_path, tmp_path)
    with pytest.raises(
        MptTrtError, match=r"takes \{.*\} in a path for a wildcard; .* a link to it"
    ):
        plan.find(path)


@pytest.mark.parametrize("path", ["mod{}el", "{a b}", "}a{", "{a", "{1.2}"])
def test_other_braces_in_paths_are_left_alone(tmp_path: Path, path: str) -> None:
    assert Plan(parse_settings({}), tmp_path, tmp_path).find(path) == path
