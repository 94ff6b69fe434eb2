"""Missing parts of machines for a target, on machines that have them and that do not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mpt_trt.commands.preflight import running_in_words
from mpt_trt.engines.memory import GB
from mpt_trt.engines.spec import BuilderChoice
from mpt_trt.errors import MptTrtError
from mpt_trt.system.machine import GIB, Gpu, Machine
from mpt_trt.workflow import preflight
from mpt_trt.workflow.preflight import Inventory, Needs
from support.engines import call_tool

NEEDS = Needs(
    target="trt_engines/m/fp16/2-gpu",
    builder=BuilderChoice("tensorrt_rtx", ("8.0", "8.9")),
    ranks=2,
    gpu_memory=20 * GB,
    build_memory=30 * GB,
    run_memory=60 * GB,
    disk=100 * GB,
    is_calibrated=True,
)
GPU = Gpu("NVIDIA L4", 24 * GB, "8.9")
COMPLETE = Inventory(
    host="node",
    machine=Machine("CPU", 8, 64 * GB / GIB, (GPU, GPU), "Linux", "3.11"),
    free_disk=200 * GB,
    driver="580.1",
    tensorrt=None,
    tensorrt_rtx="1.7",
    onnxruntime="1.31",
    onnxruntime_gpu="1.31",
    compiler="/usr/bin/cc",
    nccl="0.6",
    mpi="Open MPI 5, mpi4py 4",
    modelopt="0.47",
)


def with_machine(**changes: object) -> Inventory:
    return replace(COMPLETE, machine=replace(COMPLETE.machine, **changes))


def test_a_complete_machine_lacks_nothing() -> None:
    assert preflight.judge(NEEDS, COMPLETE) == preflight.Verdict((), (), (), ())


@pytest.mark.parametrize(
    ("inventory", "complaint"),
    [
        (replace(COMPLETE, modelopt=None), "the package nvidia-modelopt, for calibration"),
        (with_machine(memory_gib=29 * GB / GIB), "30.0 GB of memory (29.0 GB available)"),
        (replace(COMPLETE, free_disk=GB), "100.0 GB of free disk space (1.0 GB available)"),
    ],
)
def test_what_a_build_lacks(inventory: Inventory, complaint: str) -> None:
    verdict = preflight.judge(NEEDS, inventory)
    assert verdict.build == (complaint,)
    assert verdict.run == ()


@pytest.mark.parametrize(
    ("inventory", "complaint"),
    [
        (with_machine(gpus=(GPU,)), "2 GPUs with 20.0 GB of memory (1 found)"),
        (
            with_machine(gpus=(GPU, replace(GPU, memory=16 * GB))),
            "20.0 GB of GPU memory (16.0 GB available)",
        ),
        (
            with_machine(gpus=(GPU, replace(GPU, compute_capability="9.0"))),
            "9.0 among compute_capabilities in config.yaml",
        ),
        (replace(COMPLETE, nccl=None), "the package nccl4py"),
    ],
)
def test_what_tensorrt_lacks_and_onnx_runtime_makes_up_for(
    inventory: Inventory, complaint: str
) -> None:
    verdict = preflight.judge(NEEDS, inventory)
    on_gpus = () if "config.yaml" in complaint else (complaint,)
    assert verdict == preflight.Verdict((), (complaint,), on_gpus, ())


@pytest.mark.parametrize(
    ("inventory", "complaint", "words"),
    [
        (
            replace(COMPLETE, onnxruntime_gpu=None),
            "the package onnxruntime-gpu",
            "the CPU\nTensorRT needs tensorrt\n"
            "ONNX Runtime on GPUs needs the package onnxruntime-gpu",
        ),
        (
            replace(COMPLETE, compiler=None),
            "a C compiler",
            "the CPU\nTensorRT needs tensorrt\nONNX Runtime on GPUs needs a C compiler",
        ),
        (COMPLETE, None, "GPUs\nTensorRT needs tensorrt"),
    ],
)
def test_what_ranks_lack_on_gpus_under_onnx_runtime(
    inventory: Inventory, complaint: str | None, words: str
) -> None:
    verdict = preflight.judge(NEEDS, inventory)
    assert verdict.onnxruntime_gpu == (() if complaint is None else (complaint,))
    assert verdict.tensorrt == verdict.run == ()
    alone = preflight.judge(replace(NEEDS, ranks=1), replace(inventory, nccl=None, compiler=None))
    expected = (complaint,) if inventory.onnxruntime_gpu is None else ()
    assert alone.onnxruntime_gpu == expected
    without_tensorrt = replace(verdict, tensorrt=("tensorrt",))
    assert running_in_words(without_tensorrt) == f"yes, with ONNX Runtime on {words}"


def test_ranks_cannot_do_without_mpi_nor_without_memory() -> None:
    verdict = preflight.judge(NEEDS, replace(COMPLETE, mpi=None))
    assert verdict.run == ("mpirun and mpi4py",)
    small = with_machine(gpus=(), memory_gib=31 * GB / GIB)
    verdict = preflight.judge(NEEDS, small)
    assert verdict.run == ("60.0 GB of memory (31.0 GB available)",)
    assert running_in_words(verdict).split("\n") == [
        "no",
        "TensorRT needs 2 GPUs with 20.0 GB of memory (none found)",
        "ONNX Runtime on GPUs needs 2 GPUs with 20.0 GB of memory (none found)",
        "ONNX Runtime on the CPU needs 60.0 GB of memory (31.0 GB available)",
    ]
    alone = replace(NEEDS, ranks=1)
    assert preflight.judge(alone, replace(COMPLETE, mpi=None, nccl=None)).tensorrt == ()


def test_mpirun_is_found_next_to_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    assert preflight.inspect(tmp_path).mpi is None
    mpirun = tmp_path / "bin" / "mpirun"
    mpirun.parent.mkdir()
    mpirun.touch(0o755)
    found = preflight.inspect(tmp_path).mpi
    assert found is not None and found.endswith(f"; start ranks with {mpirun}")


def test_a_package_that_is_not_installed_is_named() -> None:
    verdict = preflight.judge(
        replace(NEEDS, builder=BuilderChoice("tensorrt", ("8.0",))), with_machine(gpus=())
    )
    (complaint,) = verdict.build
    assert "tensorrt" in complaint


def test_this_machine_is_inspected_and_recorded_once(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    needs = json.dumps([asdict(NEEDS)])
    call_tool("preflight.py", "--once", tmp_path, "--needs", needs)
    assert NEEDS.target in capsys.readouterr().out
    (record,) = tmp_path.iterdir()
    found = json.loads(record.read_text())
    assert found["onnxruntime"] and found["machine"]["cores"] >= 1
    assert set(found["targets"]) == {NEEDS.target}
    call_tool("preflight.py", "--once", tmp_path, "--needs", needs)
    assert capsys.readouterr().out == ""


def test_needs_of_another_form_are_refused() -> None:
    with pytest.raises(MptTrtError, match="not a JSON list of needs"):
        call_tool("preflight.py", "--needs", '[{"target": "x"}]')


# --- targets by name -----------------------------------------------------------------------------


def planned(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict:
    """Runs preflight.py in `folder`; returns its record."""
    monkeypatch.chdir(folder)
    call_tool("preflight.py", "--once", folder / "record", *options)
    (record,) = (folder / "record").glob("*.json")
    return json.loads(record.read_text())["targets"]


def test_a_target_or_a_model_and_a_variant_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [
        "smoke_tests/mpt-30b/int4_awq/4-gpu.json",
        "build/plans/mpt-7b/fp16/2-gpu/rank1.engine",
    ]
    options = ("--model", "mpt-7b", "--variant", "sq", "-tp", "2")
    found = planned(tmp_path, monkeypatch, *names, *options)
    assert list(found) == [*names, "trt_engines/mpt-7b/sq/2-gpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ft_ckpts/mpt-7b/fp16/1-gpu"], "not a target of one engine, such as trt_engines/mpt-7b"),
        (["--model=mpt-7b"], "--model and --variant belong together"),
        (["--model=mpt-7c", "--variant=fp16"], "no model named 'mpt-7c'; did you mean 'mpt-7b'"),
        (["trt_engines/mpt-7b/fp61/1-gpu"], "no variant named 'fp61'"),
        (["--model=mpt-demo", "--variant=fp16", "-tp=3"], "size 3 does not divide .* valid sizes"),
        (["trt_engines/mpt-7b/fp16/3-gpu"], "size 3 does not divide .* valid sizes"),
        (["--configfile=nowhere.yaml", "x/m/v/1-gpu"], "nowhere.yaml: cannot be read"),
    ],
)
def test_wrong_names_are_refused(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MptTrtError, match=message):
        planned(tmp_path, monkeypatch, *options)
