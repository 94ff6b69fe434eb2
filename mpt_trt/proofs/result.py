"""Result files of proofs: what engines gave for each fact, and how that compares.

Does not import NumPy, because reports and planning read results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.measured_engine import MeasuredEngine
from mpt_trt.evaluation.result_file import read_result
from mpt_trt.quantization.schemes import Quantization, make_weight_quantization
from mpt_trt.system.files import write_json
from mpt_trt.system.json_text import shown

Status = Literal["passed", "failed", "not checked"]


@dataclass(frozen=True)
class Measured:
    """What an engine gave for a fact.

    numbers: log-probabilities, bytes, a score, or the log-probability that each published greedy
    token lacks to be the most likely one. tokens, text: what the engine or its tokenizer gave; for
    greedy tokens, the most likely token after the published ones before it. problem: why the engine
    gave nothing; None if it did.
    """

    numbers: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    text: str | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class FactMeasurements(MeasuredEngine):
    """What one engine gave for the facts about engines of its kind, by their names.

    hashes: of the facts that were measured, by their names.
    """

    measured: dict[str, Measured]
    hashes: dict[str, str]

    @property
    def quantized(self) -> Quantization:
        """Quantization of the engine. Raises ValueError when its fields describe none."""
        try:
            scheme = make_weight_quantization(**self.quantization)
            return Quantization(scheme, self.kv_cache, self.head)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"quantization = {shown(self.quantization)}, kv_cache = {shown(self.kv_cache)}, "
                f"head = {shown(self.head)}: no quantization of an engine"
            ) from None


@dataclass(frozen=True)
class Verdict:
    """Comparison of one fact.

    expected, found: in words. deviation: in the fact's unit; None if it was not checked. problem:
    why it was not checked; None if it was.
    """

    name: str
    kind: str
    source: str
    engine: str
    status: Status
    expected: str
    found: str
    deviation: float | None
    tolerance: float
    reason: str
    problem: str | None


@dataclass(frozen=True)
class ProofResult:
    """A model's engines compared with all facts about the model. date: UTC day.

    engine_dirs, runtimes: of the engines that were measured.
    """

    model: str
    date: str
    engine_dirs: tuple[str, ...]
    runtimes: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    def of_status(self, status: Status) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.status == status]

    @property
    def summary(self) -> str:
        """Numbers of facts by status, in words."""
        counts = {status: len(self.of_status(status)) for status in STATUSES}
        return ", ".join(f"{count} {status}" for status, count in counts.items())


STATUSES: tuple[Status, ...] = ("passed", "failed", "not checked")


def require_proved(result: ProofResult) -> None:
    """Raises MptTrtError, listing the facts, when one failed or none was checked."""
    if failed := result.of_status("failed"):
        listed = "; ".join(
            f"{each.name} (deviation {each.deviation:.4g}, allowed {each.tolerance:.4g})"
            for each in failed
        )
        raise MptTrtError(f"{result.model}: differs from {len(failed)} published fact(s): {listed}")
    if not result.of_status("passed"):
        reasons = dict.fromkeys(str(each.problem) for each in result.verdicts)
        raise MptTrtError(
            f"{result.model}: no fact could be checked: {'; '.join(reasons) or 'there is none'}"
        )


def write_measurements(result: FactMeasurements, target: Path, inputs: Iterable[Path] = ()) -> None:
    """Writes the measurements as JSON. inputs: see `replace_file`."""
    write_json(target, asdict(result), inputs)


def read_measurements(paths: Sequence[Path]) -> list[FactMeasurements]:
    """Reads files that `write_measurements` wrote; raises MptTrtError for others."""
    return [_read_measurements(path) for path in paths]


def _read_measurements(path: Path) -> FactMeasurements:
    what = "measurements of facts"
    result = read_result(path, FactMeasurements, what)
    try:
        result.quantized  # noqa: B018
    except ValueError as error:
        raise MptTrtError(
            f"{path}: not {what} of this version, or damaged ({error}); delete it and measure again"
        ) from None
    return result


def write_proof(result: ProofResult, target: Path, inputs: Iterable[Path] = ()) -> None:
    """Writes the result as JSON. inputs: see `replace_file`."""
    write_json(target, asdict(result) | {"summary": result.summary}, inputs)


def read_proof(path: Path) -> ProofResult:
    """Reads a file that `write_proof` wrote; raises MptTrtError for any other."""
    return read_result(path, ProofResult, "the result of a proof")
