"""The workflow: jobs that run, jobs that are repeated, and messages about bad input."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpt_trt.ft.checkpoint import read_ft_checkpoint
from support.kills import StoppedWorkflow, artifacts, finish
from support.paths import REPOSITORY
from support.workflow import SMALL, Workflow

SMOKE_TEST = "smoke_tests/toy/{}/1-gpu.json"
CHAIN = ["convert_checkpoint", "make_networks", "build_rank", "assemble_engine", "smoke_test"]
CHAIN += ["check_smoke_test"]
MEASURED = "build/smoke_tests/toy/fp32/1-gpu.json"


def chain(variant: str) -> list[str]:
    return [f"{rule} {variant}" for rule in CHAIN]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """Both variants, made up to their smoke tests. Tests leave it complete."""
    workflow = Workflow.create(tmp_path_factory.mktemp("workflow") / "project")
    jobs = workflow.make(SMOKE_TEST.format("fp32"), SMOKE_TEST.format("fp16"))
    assert sorted(jobs) == sorted(chain("fp32") + chain("fp16"))
    return workflow


@pytest.fixture
def copy(made: Workflow, tmp_path: Path) -> Workflow:
    """A copy of `made`, in which nothing is to be done and which a test may leave incomplete."""
    return Workflow(Path(shutil.copytree(made.folder, tmp_path / "copy", symlinks=True)))


def both(workflow: Workflow) -> list[str]:
    return workflow.planned(SMOKE_TEST.format("fp32"), SMOKE_TEST.format("fp16"))


def test_nothing_is_done_twice(made: Workflow) -> None:
    assert both(made) == []


def test_smoke_test_says_what_ran_and_how_far_it_is(made: Workflow) -> None:
    result = json.loads((made.folder / SMOKE_TEST.format("fp32")).read_text())
    assert result["passed"] is True
    assert result["runtime"].startswith("ONNX Runtime") or result["fallback_reason"] is None
    assert 0 <= result["distance"]["max_abs"] < 1e-3
    assert result["distance"]["positions"] == result["prompt_len"] + 6 - 1
    assert result["speed"]["decode_tokens_per_s"] > 0


def test_engine_directory_shares_its_weights_with_the_ft_checkpoint(made: Workflow) -> None:
    ft = made.folder / "ft_ckpts/toy/fp16/1-gpu/model.layers.0.mlp.dense_h_to_4h.weight.0.bin"
    linked = made.folder / "trt_engines/toy/fp16/1-gpu/weights" / ft.name
    assert linked.stat().st_ino == ft.stat().st_ino


def test_only_the_changed_variant_is_made_again(made: Workflow) -> None:
    made.configure(fp16={**SMALL, "max_input_len": 20})
    try:
        planned = both(made)
    finally:
        made.configure()
    assert sorted(planned) == sorted(chain("fp16")[1:])
    assert both(made) == []


def test_a_new_tolerance_repeats_the_smoke_test_alone(made: Workflow) -> None:
    made.configure(fp16={**SMALL, "tolerance": {"error_factor": 2.0}})
    try:
        assert both(made) == ["smoke_test fp16", "check_smoke_test fp16"]
    finally:
        made.configure()


def test_a_new_variant_shares_the_ft_checkpoint(made: Workflow) -> None:
    made.configure(wide={**SMALL, "max_batch_size": 2})
    try:
        planned = made.planned("trt_engines/toy/wide/1-gpu")
    finally:
        made.configure()
    assert planned == ["make_networks wide", "build_rank wide", "assemble_engine wide"]


@pytest.mark.parametrize(
    ("module", "first"),
    [
        ("ft/layout.py", "convert_checkpoint"),
        ("network/decoder.py", "make_networks"),
        ("engines/tensorrt/plan_builder.py", "build_rank"),
        ("evaluation/smoke_result.py", "smoke_test"),
    ],
)
def test_an_edited_module_repeats_what_depends_on_it(
    made: Workflow, module: str, first: str
) -> None:
    path = made.folder / "mpt_trt" / module
    original = path.read_text()
    made.edit_module(module)
    try:
        planned = made.planned(SMOKE_TEST.format("fp32"))
    finally:
        path.write_text(original)
    assert planned == chain("fp32")[CHAIN.index(first) :]
    assert both(made) == []


def test_a_changed_checkpoint_is_noticed(made: Workflow) -> None:
    config = made.folder / "model" / "config.json"
    content = config.read_text()
    time.sleep(1.1)  # mtimes of the outputs are compared with the input's
    config.write_text(content + " ")
    planned = made.planned("ft_ckpts/toy/fp32/1-gpu")
    config.write_text(content)
    assert planned == ["convert_checkpoint fp32"]
    made.make(SMOKE_TEST.format("fp32"), SMOKE_TEST.format("fp16"))


def test_only_the_lost_plan_of_a_rank_is_built_again(made: Workflow) -> None:
    """Each rank has its own job and file."""
    engine, plan = "trt_engines/toy/fp32/2-gpu", "build/plans/toy/fp32/2-gpu/rank{}.engine"
    jobs = made.make(*map(plan.format, range(2)))
    assert jobs.count("build_rank fp32") == 2
    kept = (made.folder / plan.format(0)).stat().st_ino
    (made.folder / plan.format(1)).unlink()
    assert made.make(engine) == ["build_rank fp32", "assemble_engine fp32"]
    assert (made.folder / plan.format(0)).stat().st_ino == kept
    for rank in range(2):
        linked = made.folder / engine / f"rank{rank}.engine"
        assert linked.samefile(made.folder / plan.format(rank))
    assert made.planned(engine, plan.format(1)) == []


@pytest.mark.parametrize(
    ("lost", "target", "folder"),
    [
        ("rank0.engine", MEASURED, "trt_engines/toy/fp32/1-gpu"),
        (
            "weights/model.wte.bin",
            f"build/{SMOKE_TEST.format('fp32')}",
            "trt_engines/toy/fp32/1-gpu",
        ),
        ("rank0.onnx", "build/plans/toy/fp32/1-gpu/rank0.engine", "build/networks/toy/fp32/1-gpu"),
        ("model.wte.bin", "build/networks/toy/fp32/1-gpu", "ft_ckpts/toy/fp32/1-gpu"),
    ],
)
def test_a_damaged_folder_is_named_with_its_remedy_which_works(
    copy: Workflow, lost: str, target: str, folder: str
) -> None:
    """The reader of the folder rejects it; Snakemake sees no difference."""
    path = copy.folder / folder / lost
    path.unlink()
    assert copy.planned(target) == []
    shutil.rmtree(copy.folder / target, ignore_errors=True)
    (copy.folder / target).unlink(missing_ok=True)
    result = copy.run(target)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    complaint = re.search(rf"^error: {folder}/{lost}: .*$", output, re.MULTILINE)
    assert complaint and f"; delete {folder} and " in complaint[0]
    shutil.rmtree(copy.folder / folder)
    copy.make(target)
    assert path.is_file()
    assert (copy.folder / target).exists()


def test_a_dry_run_writes_nothing(copy: Workflow) -> None:
    """It does not touch anything, even with a damaged folder."""
    (copy.folder / "trt_engines/toy/fp32/1-gpu/rank0.engine").unlink()

    def state() -> dict[str, int]:
        paths = [path for path in copy.folder.rglob("*") if "__pycache__" not in path.parts]
        own = [path for path in paths if ".snakemake" not in path.parts]
        return {str(path): path.lstat().st_mtime_ns for path in own}

    before = state()
    copy.planned(SMOKE_TEST.format("fp32"), "trt_engines/toy/fp16/2-gpu")
    assert state() == before


def test_a_dry_run_on_a_read_only_checkout(made: Workflow, tmp_path: Path) -> None:
    """Snakemake itself keeps records in the working directory, so that is another one."""
    checkout = str(made.folder)
    mount = "mount --bind $0 $0 && mount -o remount,ro,bind $0"
    isolated = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', checkout]
    if subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount of one's own here")
    command = [sys.executable, "-m", "snakemake", "--snakefile", f"{checkout}/Snakefile"]
    result = subprocess.run(
        [*isolated, *command, "--cores", "1", "--dry-run", SMOKE_TEST.format("fp32")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".snakemake"]


def test_another_builder_version_makes_the_engine_again(made: Workflow) -> None:
    """Only the metadata shows a newer package, because the rules read nothing else."""
    fake = made.folder / "newer" / "tensorrt_rtx_cu13-99.0.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tensorrt_rtx_cu13\nVersion: 99.0\n"
    )
    result = made.run(
        "--dry-run", "trt_engines/toy/fp32/1-gpu", PYTHONPATH=str(made.folder / "newer")
    )
    output = result.stdout + result.stderr
    assert "build_rank" in output
    assert "Params have changed" in output
    assert "make_networks" not in output


def test_wrong_engines_fail_and_leave_no_result(copy: Workflow) -> None:
    """The result of an engine that passed is deleted, too."""
    copy.configure(fp16={**SMALL, "tolerance": {"error_factor": 1e-9}})
    target = SMOKE_TEST.format("fp16")
    assert (copy.folder / target).exists()
    result = copy.run(target)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    reason = "trt_engines/toy/fp16/1-gpu: too far from the float32 reference: its error is "
    last = output.rstrip().split("\n")[-1]
    assert last.startswith(f"error: {reason}") and output.count(reason) == 1
    assert "variants.fp16.tolerance.error_factor allows more" in last
    assert last.endswith("(log: logs/check_smoke_test/toy/fp16/1-gpu.log)")
    assert not (copy.folder / target).exists()
    assert json.loads((copy.folder / "build" / target).read_text())["passed"] is False


def test_smoothquant_checkpoints(made: Workflow) -> None:
    """Made for two ranks, and again when the calibration text changes, which nothing else reads."""
    target, plain = "ft_ckpts/toy/sq/2-gpu", "ft_ckpts/toy/fp16/1-gpu"
    assert made.make(target) == ["convert_smoothquant_checkpoint sq"]
    assert made.planned(target, plain) == []
    checkpoint = read_ft_checkpoint(made.folder / target)
    assert (checkpoint.smoothing, checkpoint.storage_type, checkpoint.tp_size) == (
        0.5,
        "float16",
        2,
    )
    calibration = checkpoint.manifest["calibration"]
    assert (calibration["text"], calibration["num_samples"]) == ("calibration.txt", 4)
    text = made.folder / "calibration.txt"
    content = text.read_text()
    try:
        text.write_text(content * 2)
        assert made.planned(target, plain) == ["convert_smoothquant_checkpoint sq"]
    finally:
        text.write_text(content)


def test_smoothquant_settings_in_the_name(made: Workflow) -> None:
    target = "ft_ckpts/toy/sq-0.8-bf16/1-gpu"
    assert made.make(target) == ["convert_smoothquant_checkpoint sq-0.8-bf16"]
    checkpoint = read_ft_checkpoint(made.folder / target)
    assert (checkpoint.smoothing, checkpoint.storage_type) == (0.8, "bfloat16")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("trt_engines/toi/fp16/1-gpu", "no model named 'toi'; did you mean 'toy'?"),
        ("trt_engines/toy/fp61/1-gpu", "no variant named 'fp61'; did you mean 'fp16'?"),
        ("ft_ckpts/toy/fp8/1-gpu", "no such storage type; known are fp32, fp16, bf16"),
        ("ft_ckpts/toy/sq-1.5/1-gpu", "no such storage type; known are fp32, fp16, bf16"),
    ],
)
def test_misspelt_targets_get_a_hint(made: Workflow, target: str, message: str) -> None:
    last = made.last_line("--dry-run", target)
    assert last.startswith("error: ") and last.count(message) == 1


def test_a_misspelt_key_gets_a_hint(made: Workflow) -> None:
    made.configure(fp16={"max_bach_size": 4})
    try:
        last = made.last_line("--dry-run", "trt_engines/toy/fp32/1-gpu")
    finally:
        made.configure()
    message = "unknown key 'max_bach_size'; did you mean 'max_batch_size'?"
    assert last == f"error: config.yaml: variants.fp16: {message}"


def test_a_missing_model_folder_is_named(made: Workflow) -> None:
    config = made.folder / "config.yaml"
    content = config.read_text()
    config.write_text(content.replace("source: model", "source: ./nowhere"))
    try:
        result = made.run("--dry-run", "ft_ckpts/toy/fp32/1-gpu")
    finally:
        config.write_text(content)
    assert result.returncode != 0
    assert "no such folder: nowhere" in result.stdout + result.stderr


def test_interrupted_and_killed_it_ends_with_the_same_artifacts(
    made: Workflow, tmp_path: Path
) -> None:
    workflow, target = Workflow.create(tmp_path / "project"), SMOKE_TEST.format("fp32")
    network = workflow.folder / "build/networks/toy/fp32/1-gpu"
    run = StoppedWorkflow(workflow, target)
    run.wait_until(network.exists)
    # Ctrl-C reaches the whole foreground process group.
    assert run.stop(signal.SIGINT)
    assert list(workflow.folder.rglob(".*partial*")) == []
    rest = ("make_networks fp32", "build_rank fp32", "assemble_engine fp32")
    planned = workflow.planned(target)
    assert planned[0] in rest
    killed = 0
    # make_networks may have ended before the signal.
    for rule in (
        name for name in ("make_networks", "build_rank", "smoke_test") if f"{name} fp32" in planned
    ):
        run = StoppedWorkflow(workflow, target)
        run.wait_for(f"rule {rule}:")
        time.sleep(random.random())
        killed += run.stop(signal.SIGKILL)
    assert killed > 0
    finish(workflow, target)
    # Other tests make more there.
    expected = {path: each for path, each in artifacts(made).items() if "/fp32/1-gpu" in path}
    assert artifacts(workflow) == expected


def test_shipped_models_plan_without_a_network(made: Workflow) -> None:
    """Planning asks no hub, and needs nothing but the repository."""
    result = subprocess.run(
        [
            sys.executable, "-m", "snakemake", "--dry-run", "--cores", "2", "--directory",
            str(made.folder), "--configfile", str(REPOSITORY / "config.yaml"), "--",
            *(f"trt_engines/{model}/{variant}/1-gpu"
              for model in ("mpt-7b", "mpt-30b", "replit-code-v1_5-3b")
              for variant in ("fp32", "fp16", "bf16")),
        ],
        cwd=made.folder,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert output.count("rule resolve_revision:") == 3
