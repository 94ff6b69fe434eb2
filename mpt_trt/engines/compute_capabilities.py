"""Compute capabilities that TensorRT-RTX builds plans for, and those with fp8."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mpt_trt.errors import MptTrtError
from mpt_trt.quantization.schemes import Quantization

if TYPE_CHECKING:
    # It imports importlib.metadata, which all options' defaults would wait for.
    from mpt_trt.engines.tensorrt.packages import Package

DEFAULT = ("8.0", "8.6", "8.9", "12.0")
"""GPUs that every release of TensorRT-RTX builds for; see `default_capabilities`."""
# First compute capability with E4M3 arithmetic (Ada).
FP8_CAPABILITY = (8, 9)


def default_capabilities(quantization: Quantization) -> tuple[str, ...]:
    """Default GPUs of an engine: those of DEFAULT that can compute it."""
    return tuple(each for each in DEFAULT if _has_fp8(each) or not quantization.uses_fp8)


def require_fp8_support(
    capabilities: tuple[str, ...], quantization: Quantization, field: str = "compute_capabilities"
) -> None:
    """Raises MptTrtError if the engine uses fp8 and one of the GPUs to build for lacks it.

    field: key or option that names the GPUs.
    """
    unsupported = [each for each in capabilities if not _has_fp8(each)]
    if quantization.uses_fp8 and unsupported:
        raise MptTrtError(
            f"{field}: {', '.join(unsupported)} cannot compute with fp8, which needs "
            f"{'.'.join(map(str, FP8_CAPABILITY))} or newer; leave them out, or choose int8"
        )


def require_buildable(
    package: Package, capabilities: tuple[str, ...], field: str = "compute_capabilities"
) -> None:
    """Raises MptTrtError if the package, TensorRT-RTX, does not build for one of the GPUs.

    The package is imported only for GPUs that some releases do not build for.
    """
    if not (others := [each for each in capabilities if each not in DEFAULT]):
        return
    members = importlib.import_module(package.module).ComputeCapability.__members__
    known = [f"{name[2:-1]}.{name[-1]}" for name in members if name.startswith("SM")]
    if unknown := [each for each in others if each not in known]:
        raise MptTrtError(
            f"{field} = {unknown[0]}: {package.module} {package.version} builds for "
            f"{', '.join(known)} only; leave it out, or choose backend tensorrt on such a GPU"
        )


def _has_fp8(capability: str) -> bool:
    return tuple(map(int, capability.split("."))) >= FP8_CAPABILITY
