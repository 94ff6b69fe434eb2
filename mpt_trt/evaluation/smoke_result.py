"""Result file of a smoke test, `smoke_tests/{model}/{variant}/{tp}-gpu.json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mpt_trt.engines.spec import BuilderInfo
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.distance import Distance, Tolerance
from mpt_trt.evaluation.result_file import read_result
from mpt_trt.evaluation.speed import Speed
from mpt_trt.system.files import write_json
from mpt_trt.system.replace import is_replaced, remove_file, require_writable


@dataclass(frozen=True)
class SmokeResult:
    """A generation by an engine, compared with the float32 reference.

    engines: names of the ranks' plans in engine_dir. runtime: the runtime that ran the engine.
    fallback_reason: why it was not TensorRT; None if it was. text: the continuation of prompt.
    tokens: prompt and continuation. prompt_len: tokens of the prompt. reference: the software that
    computed the reference.
    """

    engine_dir: str
    engines: tuple[str, ...]
    builder: BuilderInfo
    ranks: int
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

    @property
    def violations(self) -> list[str]:
        """Describes each figure of the distance that exceeds the tolerance."""
        return self.distance.violations(self.tolerance)


def write_smoke_result(result: SmokeResult, output: Path, inputs: Iterable[Path] = ()) -> None:
    """Writes the result to `output`, with a key `passed`. inputs: see `replace_file`.

    Raises MptTrtError when the distance exceeds the tolerance. The result then goes to
    {output}.rejected, unless `output` is a device or pipe. The other file is removed.
    """
    inputs = tuple(inputs)
    violations = result.violations
    content = asdict(result) | {"passed": not violations}
    rejected = rejected_path(output)
    require_writable(output, inputs)
    if not violations:
        write_json(output, content, inputs)
        if is_replaced(output):
            remove_file(rejected)
        return
    if is_replaced(output):
        write_json(rejected, content, inputs)
        remove_file(output)
    else:
        write_json(output, content)
        rejected = output
    raise MptTrtError(
        f"{result.engine_dir}: too far from the reference: {', '.join(violations)}; see {rejected}"
    )


def rejected_path(output: Path) -> Path:
    """Path of a result that exceeds the tolerance."""
    return output.with_name(output.name + ".rejected")


def read_smoke_result(path: Path) -> SmokeResult:
    """Reads a result; raises MptTrtError when `write_smoke_result` did not write the file."""
    return read_result(path, SmokeResult, "a result of a smoke test")
