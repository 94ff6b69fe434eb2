"""The report of a first contact: a table, and a file to attach to a bug report."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import mpt_trt
from first_contact.run_case import Result
from mpt_trt.system import gpus
from mpt_trt.system.machine import describe_machine

PACKAGES = (
    "tensorrt",
    "tensorrt_cu13",
    "tensorrt_rtx_cu13",
    "cuda-bindings",
    "nccl4py",
    "numpy",
    "onnx",
    "onnxruntime",
    "torch",
)
COLUMNS = ("", "status", "difference", "KL", "KL of ONNX Runtime", "same text", "tokens/s")


def write_report(results: list[Result], target: Path) -> None:
    """Writes everything that is known as JSON."""
    content = {
        "mpt_trt": mpt_trt.__version__,
        "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "gpus": list(gpus.names()),
        "compute_capabilities": list(gpus.compute_capabilities()),
        "driver": gpus.driver_version(),
        "machine": asdict(describe_machine()),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "summary": dict(Counter(result.status for result in results)),
        "results": [vars(result) for result in results],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n")


def table(results: list[Result]) -> str:
    """The results as a Markdown table, with messages and broken rules below."""
    lines = [_row(COLUMNS), _row(("---",) * len(COLUMNS))]
    lines += [_row(_cells(result)) for result in results]
    notes = [
        f"- {result.name}: {text}"
        for result in results
        for text in (result.message, *result.broken)
        if text
    ]
    return "\n".join([*lines, "", *notes])


def _cells(result: Result) -> tuple[str, ...]:
    texts = {None: "", True: "yes", False: "no"}
    return (
        result.name,
        result.status,
        _number(result.difference),
        _number(result.kl),
        _number(result.kl_onnxruntime),
        texts[result.same_text],
        _number(result.decode_tokens_per_s),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
