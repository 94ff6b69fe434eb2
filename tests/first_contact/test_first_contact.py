"""The logic of `make test-tensorrt`, on the simulated TensorRT."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from first_contact import run_case as runner
from first_contact.__main__ import main, run_alone
from first_contact.cases import Case, all_cases, largest_fit
from first_contact.report import table, write_report
from first_contact.run_case import Result, run_case
from mpt_trt.engines.tensorrt import engine
from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpus
from support.engines import COMPUTE_CAPABILITIES, FEATURES
from support.simulated.install import installed

GB = 10**9
CASES = {case.name: case for case in all_cases("8.9", 0, 0)}


@pytest.fixture
def simulation(monkeypatch):
    """Plans are built by TensorRT-RTX and run by the simulation."""
    with installed(COMPUTE_CAPABILITIES[0]) as made:
        # Contexts of a failed case may be left in its traceback.
        made.is_clean_at_end = False
        real = runner._build

        def build_and_register(*arguments):
            # Building needs the real module.
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, "tensorrt_rtx", made.real_module)
                engine_dir = real(*arguments)
            made.register(engine_dir)
            return engine_dir

        monkeypatch.setattr(runner, "_build", build_and_register)
        yield made


@pytest.mark.parametrize("name", ["float16", "int8 cache", "mpt-demo, fp16"])
def test_a_case_that_is_as_it_should_be(name, simulation, tmp_path):
    result = run_case(CASES[name], tmp_path)
    assert (result.status, result.message, result.broken) == ("ok", "", [])
    assert result.runtime.startswith("tensorrt_rtx 1.") and result.build_seconds > 0
    assert result.kl == pytest.approx(result.kl_onnxruntime, rel=0.2, abs=1e-6)
    if name == "mpt-demo, fp16":
        assert result.decode_tokens_per_s > 0 and result.prefill_tokens_per_s > 0
    else:
        assert result.same_text is True and result.difference <= CASES[name].bound


def test_wrong_numbers_are_noticed(simulation, tmp_path, monkeypatch):
    real = engine.TensorRtEngine.step
    monkeypatch.setattr(engine.TensorRtEngine, "step", lambda *given: -real(*given))
    result = run_case(CASES["float16"], tmp_path)
    assert result.status == "wrong" and result.same_text is False
    assert "difference" in result.message and "KL" in result.message


def test_a_broken_rule_is_noticed(simulation, tmp_path, monkeypatch):
    monkeypatch.setattr(simulation.book, "require", lambda *_: None)
    monkeypatch.setattr("mpt_trt.engines.cuda.kv_cache.ALIGNMENT", 1)
    odd = replace(FEATURES["multi-head"], hidden_size=60, num_heads=6, num_kv_heads=3)
    result = run_case(Case("odd", "feature", "float16", odd), tmp_path)
    assert result.status == "wrong" and "broken rules" in result.message
    assert any(text.startswith("ADDRESS_ALIGNED") for text in result.broken)


def test_a_failing_step_is_reported(simulation, tmp_path):
    simulation.world.failing.add("execute_async_v3")
    result = run_case(CASES["float16"], tmp_path)
    assert result.status == "failed" and "a kernel failed (simulated)" in result.message


def test_a_process_that_dies_is_reported(tmp_path):
    case = Case("nothing", "feature", "float16")
    result = run_alone(case, [], tmp_path / "out", module="no_such_module")
    assert result.status == "failed"
    assert result.message.startswith("status 1: ") and "no_such_module" in result.message


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["first_contact"])
    monkeypatch.setattr(gpus, "compute_capabilities", lambda: ())
    with pytest.raises(MptTrtError, match="no NVIDIA GPU found"):
        main()


def test_cases_cover_features_quantizations_and_types():
    kinds = [case.kind for case in CASES.values()]
    assert set(FEATURES) <= set(CASES) and {"float32", "float16", "bfloat16"} <= set(CASES)
    assert kinds.count("demo") == 2 and "random" not in kinds
    without_fp8 = [case for case in all_cases("8.6", 0, 0) if case.quantization.uses_fp8]
    assert not without_fp8


def test_the_random_model_fits():
    assert largest_fit(24 * GB, 500 * GB) == "mpt-7b"
    assert largest_fit(80 * GB, 500 * GB).startswith("mpt-30b")
    # Limited by the disk.
    assert largest_fit(80 * GB, 20 * GB) not in ("", "mpt-7b", "mpt-30b")
    assert largest_fit(GB, 500 * GB) == ""


def test_report(tmp_path):
    results = [
        Result("one", "feature", "ok", difference=0.01234, kl=1e-5, same_text=True),
        Result("two", "feature", "failed", "MptTrtError: no", broken=["SHAPE_SET: x"]),
    ]
    write_report(results, tmp_path / "new" / "report.json")
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["summary"] == {"ok": 1, "failed": 1}
    assert content["results"][1]["message"] == "MptTrtError: no"
    assert content["packages"]["onnxruntime"] and content["machine"]
    text = table(results)
    assert "| one | ok | 0.0123 | 1e-05 |  | yes |  |" in text
    assert text.endswith("- two: MptTrtError: no\n- two: SHAPE_SET: x")
