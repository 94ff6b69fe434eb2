"""Names of artifacts give their settings, and settings give the name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt_trt.errors import MptTrtError
from mpt_trt.quantization.schemes import Awq, Fp8, Gptq, Mixed, SmoothQuant, WeightOnly
from mpt_trt.workflow import target_names
from mpt_trt.workflow.target_names import CalibrationName, FtStorage

STORAGE_TYPES = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("fp32", FtStorage("float32")),
        ("fp16", FtStorage("float16")),
        ("bf16", FtStorage("bfloat16")),
        ("sq", FtStorage("float16", 0.5)),
        ("sq-bf16", FtStorage("bfloat16", 0.5)),
        ("sq-0.8", FtStorage("float16", 0.8)),
        ("sq-0-fp32", FtStorage("float32", 0.0)),
    ],
)
def test_ft_storage(name: str, storage: FtStorage) -> None:
    assert target_names.ft_storage(name) == storage
    assert storage.name == name


@given(st.sampled_from(STORAGE_TYPES), st.none() | st.integers(0, 1000).map(lambda i: i / 1000))
def test_every_ft_storage_has_a_name_of_its_own(storage_type: str, alpha: float | None) -> None:
    storage = FtStorage(storage_type, alpha)
    assert target_names.ft_storage(storage.name) == storage


@pytest.mark.parametrize(
    "name", ["fp8", "sq-", "sq-0.5", "sq-fp16", "sq-2", "sq-0.8.1", "sq-0.80", "SQ", "", "sq--fp32"]
)
def test_unknown_ft_storage(name: str) -> None:
    with pytest.raises(MptTrtError, match="no such storage type; known are fp32, fp16, bf16"):
        target_names.ft_storage(name)


@pytest.mark.parametrize(
    ("scheme", "kv_cache", "name"),
    [
        (None, "auto", None),
        (None, "int8", "kv_cache"),
        (WeightOnly(8), "auto", None),
        (WeightOnly(4), "fp8", "kv_cache"),
        (SmoothQuant(), "auto", None),
        (SmoothQuant(), "int8", "kv_cache"),
        (Awq(), "auto", "int4_awq"),
        (Awq(64), "int8", "int4_awq-g64"),
        (Gptq(), "auto", "int4_gptq"),
        (Gptq(32), "auto", "int4_gptq-g32"),
        (Awq(scales="error"), "auto", "int4_awq-error"),
        (Awq(32, "error"), "auto", "int4_awq-g32-error"),
        (Mixed(4.5), "auto", "mixed-b4.5"),
        (Fp8(), "fp8", "fp8"),
    ],
)
def test_calibration_of_a_variant(scheme, kv_cache: str, name: str | None) -> None:
    found = target_names.calibration_of(scheme, kv_cache)
    assert (found and found.name) == name
    if name is not None:
        assert target_names.calibration_name(name) == found


@pytest.mark.parametrize(
    "name",
    [
        *(
            "int4",
            "int4_awq-64",
            "int4_awq-g48",
            "int4_awq-amax",
            "int4_gptq-error",
            "fp8-g128",
            "",
        ),
        *("mixed", "mixed-b4.50", "mixed-4"),
    ],
)
def test_unknown_calibration(name: str) -> None:
    with pytest.raises(MptTrtError, match="known are int4_awq, int4_gptq, fp8, int8_sq, kv_cache"):
        target_names.calibration_name(name)


def test_a_budget_that_no_format_meets() -> None:
    with pytest.raises(MptTrtError, match=r"bits = 3\.9: 4\.125 .* to 16 bits per weight"):
        target_names.calibration_name("mixed-b3.9")


def test_int8_sq_is_a_calibration_of_its_own() -> None:
    assert target_names.calibration_name("int8_sq") == CalibrationName("int8_sq")
