"""Result file of a smoke test, `smoke_tests/{model}/{variant}/{tp}-gpu.json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpt_trt.engines.spec import BuilderInfo
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.distance import (
    Distance,
    Tolerance,
    Violation,
    allowed_error,
    violations,
)
from mpt_trt.evaluation.result_file import read_result
from mpt_trt.evaluation.speed import Speed
from mpt_trt.quantization.schemes import (
    HeadType,
    KvCacheType,
    Quantization,
    make_weight_quantization,
)
from mpt_trt.system.files import write_json
from mpt_trt.system.json_text import shown


@dataclass(frozen=True)
class SmokeResult:
    """A generation by an engine, compared with the float32 reference.

    engines: names of the ranks' plans in engine_dir. quantization: as in config.yaml, with the
    options of its own method. kv_cache: type of keys and values, head: of head and embedding;
    `auto` means dtype. runtime: the runtime that ran the engine. fallback_reason: why it was not
    TensorRT; None if it was. text: the continuation of prompt. tokens: prompt and continuation.
    prompt_len: tokens of the prompt. reference: the software that computed the reference.
    """

    engine_dir: str
    engines: tuple[str, ...]
    builder: BuilderInfo
    ranks: int
    dtype: str
    quantization: dict[str, Any]
    kv_cache: KvCacheType
    runtime: str
    fallback_reason: str | None
    prompt: str
    text: str
    tokens: tuple[int, ...]
    prompt_len: int
    speed: Speed
    reference: str
    distance: Distance
    tolerance: Tolerance
    head: HeadType = "auto"

    def __post_init__(self) -> None:
        try:
            _ = self._quantization
        except (TypeError, KeyError) as error:
            raise ValueError(f"quantization = {shown(self.quantization)}: {error}") from None

    @property
    def violations(self) -> list[Violation]:
        """Each figure of the distance that exceeds the tolerance."""
        return violations(self.distance, self._quantization, self.tolerance)

    @property
    def allowed_error(self) -> float:
        """The largest `distance.error` that passes."""
        return allowed_error(self.distance, self._quantization, self.tolerance)

    @property
    def passed(self) -> bool:
        return not self.violations

    @property
    def _quantization(self) -> Quantization:
        scheme = make_weight_quantization(**self.quantization)
        return Quantization(scheme, self.kv_cache, self.head)


def require_passed(result: SmokeResult, path: Path, key: str) -> None:
    """Raise MptTrtError when a figure exceeds the tolerance.

    path: of the result. key: what stands before the tolerance's own keys, such as `--`.
    """
    if found := result.violations:
        reasons = " and ".join(f"{each.text}; {key}{each.key} allows more" for each in found)
        raise MptTrtError(
            f"{result.engine_dir}: too far from the float32 reference: {reasons}; see {path}"
        )


def write_smoke_result(result: SmokeResult, output: Path, inputs: Iterable[Path] = ()) -> None:
    """Writes the result to `output`, with keys `passed` and `allowed_error`.

    inputs: see `replace_file`.
    """
    extra = {"allowed_error": result.allowed_error, "passed": result.passed}
    write_json(output, asdict(result) | extra, inputs)


def read_smoke_result(path: Path) -> SmokeResult:
    """Reads a result; raises MptTrtError when `write_smoke_result` did not write the file."""
    return read_result(path, SmokeResult, "a result of a smoke test")
