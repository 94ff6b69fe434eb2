"""Names of artifacts in target paths, and their meaning.

An FT checkpoint is `fp32`, `fp16`, `bf16` or, for SmoothQuant, `sq`, which means alpha 0.5 and
float16; other settings are part of the name: `sq-0.8-bf16`. A calibration result is `fp8`,
`int8_sq`, `kv_cache`, `int4_awq` or `int4_gptq`; with a group size, `int4_awq-g64`; with scales by
error, `int4_awq-error` or `int4_awq-g64-error`; of mixed, `mixed-b5.5`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import get_args

from mpt_trt.errors import MptTrtError
from mpt_trt.quantization.schemes import (
    GROUP_SIZES,
    GROUPED,
    Awq,
    Gptq,
    KvCacheType,
    Mixed,
    QuantizationFormat,
    ScaleChoice,
    SmoothQuant,
    WeightQuantization,
    calibration_format,
)

TARGET_FORMS = (
    "smoke_tests/{model}/{variant}/{tp}-gpu.json",
    "trt_engines/{model}/{variant}/{tp}-gpu",
    "quality/{model}/{variant}/{tp}-gpu.json",
    "throughput/{model}/{variant}/{tp}-gpu.json",
    "proofs/{model}.json",
    "reports/{model}.html",
    "ft_ckpts/{model}/{storage}/{tp}-gpu",
    "quantized/{model}/{qformat}/mpt_tp1_rank0.npz",
    "build/plans/{model}/{variant}/{tp}-gpu/rank{rank}.engine",
    "trtllm_ckpts/{model}/{variant}/{tp}-gpu",
)
"""Forms of the targets that users request."""
FORMATS: tuple[QuantizationFormat, ...] = get_args(QuantizationFormat)
STORAGES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
STORAGE_OF_TYPE = {storage_type: name for name, storage_type in STORAGES.items()}
DEFAULT_ALPHA = 0.5
DEFAULT_STORAGE = "float16"


@dataclass(frozen=True)
class FtStorage:
    """Storage of an FT checkpoint. alpha: SmoothQuant's; None for a plain checkpoint."""

    storage_type: str
    alpha: float | None = None

    @property
    def name(self) -> str:
        if self.alpha is None:
            return STORAGE_OF_TYPE[self.storage_type]
        parts = ["sq"]
        if self.alpha != DEFAULT_ALPHA:
            parts.append(f"{self.alpha:g}")
        if self.storage_type != DEFAULT_STORAGE:
            parts.append(STORAGE_OF_TYPE[self.storage_type])
        return "-".join(parts)


def ft_storage(name: str) -> FtStorage:
    """Parses the name of an FT checkpoint; raises MptTrtError for an unknown name."""
    if name in STORAGES:
        return FtStorage(STORAGES[name])
    match = re.fullmatch(rf"sq(?:-([0-9.]+))?(?:-({'|'.join(STORAGES)}))?", name)
    try:
        found = match and FtStorage(
            STORAGES[match[2]] if match[2] else DEFAULT_STORAGE,
            float(match[1] or DEFAULT_ALPHA),
        )
    except ValueError:
        found = None
    if not found or found.name != name or not 0 <= (found.alpha or 0) <= 1:
        raise MptTrtError(
            f"FT checkpoint {name!r}: no such storage type; known are {', '.join(STORAGES)}, and "
            "for SmoothQuant sq (alpha 0.5, fp16), sq-0.8, sq-bf16, sq-0.8-bf16 and the like"
        )
    return found


def ft_storage_of(dtype: str, scheme: WeightQuantization | None) -> FtStorage:
    """Storage of the FT checkpoint that a variant's network is made from."""
    return FtStorage(dtype, scheme.alpha if isinstance(scheme, SmoothQuant) else None)


@dataclass(frozen=True)
class CalibrationName:
    """Format of a calibration result.

    group_size: None for the model's default. bits: of mixed. scales: of int4_awq.
    """

    quantization_format: QuantizationFormat
    group_size: int | None = None
    bits: float | None = None
    scales: ScaleChoice = "amax"

    @property
    def name(self) -> str:
        group = "" if self.group_size is None else f"-g{self.group_size}"
        bits = "" if self.bits is None else f"-b{self.bits:g}"
        scales = "" if self.scales == "amax" else f"-{self.scales}"
        return f"{self.quantization_format}{group}{bits}{scales}"


def calibration_name(name: str) -> CalibrationName:
    """Parses the name of a calibration result; raises MptTrtError for an unknown name."""
    if match := re.fullmatch(r"mixed-b([0-9]+(?:\.[0-9]+)?)", name):
        mixed = CalibrationName("mixed", bits=float(match[1]))
        if mixed.name == name:
            Mixed(float(match[1]))  # raises MptTrtError for a budget that no format meets
            return mixed
    known = [CalibrationName(each) for each in FORMATS if each != "mixed"]
    known += [CalibrationName(grouped, size) for grouped in GROUPED for size in GROUP_SIZES]
    known += [replace(e, scales="error") for e in known if e.quantization_format == "int4_awq"]
    by_name = {entry.name: entry for entry in known}
    if name not in by_name:
        raise MptTrtError(
            f"calibration {name!r}: no such format; known are {', '.join(by_name)}, and mixed-b4.5 "
            "and the like"
        )
    return by_name[name]


def calibration_of(
    scheme: WeightQuantization | None, kv_cache: KvCacheType
) -> CalibrationName | None:
    """Calibration result that a variant's network is made from; None if it needs none."""
    quantization_format = calibration_format(scheme, kv_cache)
    if quantization_format is None:
        return None
    group_size = scheme.group_size if isinstance(scheme, Awq | Gptq) else None
    bits = scheme.bits if isinstance(scheme, Mixed) else None
    scales = scheme.scales if isinstance(scheme, Awq) else "amax"
    return CalibrationName(quantization_format, group_size, bits, scales)
