"""What a result file records about the engine that was measured, and where."""

from __future__ import annotations

import datetime
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_trt.engines.spec import BuilderInfo
from mpt_trt.quantization.schemes import as_mapping
from mpt_trt.system.machine import Machine, describe_machine

if TYPE_CHECKING:  # a report reads results, and loads no engine
    from mpt_trt.engines.load import LoadedEngine

KIB = 1 << 10


@dataclass(frozen=True, kw_only=True)
class MeasuredEngine:
    """An engine, the runtime that ran it, the machine and the UTC day.

    quantization: as in config.yaml, with the options of its own method. kv_cache: type of keys and
    values, head: of head and embedding; `auto` means dtype. fallback_reason: why the runtime was
    not TensorRT; None if it was. peak_memory: bytes of host memory, the sum of the ranks' peaks up
    to the end of the speed measurement.
    """

    engine_dir: str
    model_name: str
    ranks: int
    dtype: str
    quantization: dict[str, Any]
    kv_cache: str
    head: str = "auto"
    builder: BuilderInfo
    runtime: str
    fallback_reason: str | None
    machine: Machine
    date: str
    peak_memory: int


def describe_engine(engine: LoadedEngine, folder: Path, peak_memory: int) -> dict[str, Any]:
    """Fields of `MeasuredEngine`, for an engine that was loaded from `folder`."""
    manifest, quantization = engine.manifest, engine.manifest.spec.quantization
    measured = MeasuredEngine(
        engine_dir=str(folder),
        model_name=manifest.model_name,
        ranks=manifest.spec.tp_size,
        dtype=manifest.spec.dtype,
        quantization=as_mapping(quantization.scheme),
        kv_cache=quantization.kv_cache,
        head=quantization.head,
        builder=manifest.builder,
        runtime=engine.runtime,
        fallback_reason=engine.fallback_reason,
        machine=describe_machine(),
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        peak_memory=peak_memory,
    )
    return vars(measured)


def peak_memory_of_ranks(engine: LoadedEngine) -> int:
    """Bytes of host memory: the sum of all ranks' peak resident sets so far."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return own if engine.communicator is None else sum(engine.communicator.exchange(own))
