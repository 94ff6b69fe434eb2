"""The file that a smoke test leaves: its result, or what was rejected, beside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.distance import Distance
from mpt_trt.system.files import write_json
from mpt_trt.workflow.settings import Tolerance


def write_smoke_result(
    output: Path, facts: dict[str, Any], distance: Distance, tolerance: Tolerance
) -> None:
    """Writes `facts` and the distance to `output`.

    Raises MptTrtError when the distance exceeds the tolerance; then they go to {output}.rejected
    instead. The other of the two files is removed.
    """
    violations = distance.violations(tolerance)
    result = facts | {
        "distance": asdict(distance),
        "tolerance": asdict(tolerance),
        "passed": not violations,
    }
    rejected = output.with_name(output.name + ".rejected")
    if violations:
        output.unlink(missing_ok=True)
        write_json(rejected, result)
        raise MptTrtError(
            f"{facts['engine_dir']}: too far from the reference: {', '.join(violations)}; "
            f"see {rejected}"
        )
    rejected.unlink(missing_ok=True)
    write_json(output, result)
