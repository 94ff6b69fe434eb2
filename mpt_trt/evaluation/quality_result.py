"""The file of a quality measurement: `quality/{model}/{variant}/{tp}-gpu.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpt_trt.engines.manifest import BuilderInfo
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.distance import Speed
from mpt_trt.system.files import read_json, write_json
from mpt_trt.system.machine import Machine


@dataclass(frozen=True)
class Estimate:
    """A mean over windows and its standard error; None of a single window."""

    mean: float
    standard_error: float | None


@dataclass(frozen=True)
class Figures:
    """An engine's predictions of held-out text. Logarithms are natural: nats.

    nats_per_token: mean negative log-probability of the token that follows. perplexity: its
    exponential. reference_...: the same of the reference. excess: nats a token more than the
    reference needs, paired: most of what makes windows differ cancels. kl: mean
    KL(reference || engine) of the next-token distributions. top1: share of positions with the same
    most likely token. windows, tokens: how many were measured.
    """

    nats_per_token: Estimate
    perplexity: float
    reference_nats_per_token: Estimate
    reference_perplexity: float
    excess: Estimate
    kl: Estimate
    top1: Estimate
    windows: int
    tokens: int


@dataclass(frozen=True)
class Size:
    """Bytes on disk of all ranks. A file that ranks share, or that has two names, counts once.

    plans: what TensorRT loads. networks: graphs and weights, which ONNX Runtime loads and plans are
    built from. total: of every file in the directory.
    """

    plans: int
    networks: int
    total: int


@dataclass(frozen=True)
class QualityResult:
    """One engine, measured.

    quantization: as in config.yaml, with the options of its own method. kv_cache: type of keys and
    values; `auto` means dtype. runtime: what ran the engine. fallback_reason: why that was not
    TensorRT; None when it was. date: UTC day. reference: what computed it. text: file name.
    window_length: tokens of a window. speed: of one sequence, prompt_len tokens and new_tokens
    behind them. peak_memory: most bytes of host memory that each rank had taken by then, in sum.
    """

    engine_dir: str
    model_name: str
    ranks: int
    dtype: str
    quantization: dict[str, Any]
    kv_cache: str
    builder: BuilderInfo
    runtime: str
    fallback_reason: str | None
    machine: Machine
    date: str
    reference: str
    text: str
    text_hash: str
    window_length: int
    figures: Figures
    size: Size
    speed: Speed
    prompt_len: int
    new_tokens: int
    peak_memory: int


def write_quality(result: QualityResult, target: Path) -> None:
    write_json(target, asdict(result))


def read_quality(path: Path) -> QualityResult:
    """Raises MptTrtError when it is not a file that `write_quality` wrote."""
    content = read_json(path)
    try:
        special = {
            "builder": BuilderInfo(**_with_tuples(content["builder"], "compute_capabilities")),
            "machine": Machine(**_with_tuples(content["machine"], "gpus")),
            "figures": _figures(content["figures"]),
            "size": Size(**content["size"]),
            "speed": Speed(**content["speed"]),
        }
        return QualityResult(**content | special)
    except (KeyError, TypeError) as error:
        raise MptTrtError(
            f"{path}: not of this version, or damaged ({error!r}); measure it again"
        ) from None


def _figures(content: dict) -> Figures:
    return Figures(
        **{
            name: Estimate(**value) if isinstance(value, dict) else value
            for name, value in content.items()
        }
    )


def _with_tuples(content: dict, key: str) -> dict:
    return content | {key: tuple(content[key])}
