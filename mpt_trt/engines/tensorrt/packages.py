"""Finds the installed TensorRT packages, without importing them, and chooses the builder."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata

from mpt_trt.engines.spec import TENSORRT_RTX
from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpus

# Distributions that provide each module; the CUDA version is part of their name.
DISTRIBUTIONS = {
    "tensorrt": ("tensorrt_cu13", "tensorrt_cu12", "tensorrt"),
    TENSORRT_RTX: ("tensorrt_rtx_cu13", "tensorrt_rtx_cu12", "tensorrt_rtx"),
}


@dataclass(frozen=True)
class Package:
    """An installed TensorRT, by module name and version."""

    module: str
    version: str


@functools.cache
def installed_package(module: str) -> Package | None:
    """Installed distribution that provides the module; None if there is none."""
    for distribution in DISTRIBUTIONS[module]:
        try:
            return Package(module, metadata.version(distribution))
        except metadata.PackageNotFoundError:
            continue
    return None


def choose_package(backend: str, has_gpu: bool | None = None) -> Package:
    """Chooses the package for a backend: `tensorrt`, `tensorrt_rtx` or `auto`.

    `auto` prefers `tensorrt` if it is installed and there is a GPU. has_gpu: whether the build will
    have a GPU; None to ask this machine.

    Raises MptTrtError when the package is not installed, or the backend does not build plans.
    """
    if backend != "auto" and backend not in DISTRIBUTIONS:
        raise MptTrtError(
            f"backend = {backend}: it builds whole engines, not plans; request the target "
            "trt_engines/{model}/{variant}/{tp}-gpu"
        )
    if backend != "auto":
        candidates = [backend]
    elif gpus.compute_capabilities() if has_gpu is None else has_gpu:
        candidates = ["tensorrt", TENSORRT_RTX]
    else:
        candidates = [TENSORRT_RTX]
    for module in candidates:
        if package := installed_package(module):
            return package
    raise MptTrtError(
        f"backend = {backend}: {' or '.join(candidates)} is not installed; "
        "pip install -r requirements.txt installs tensorrt_rtx, which needs no GPU"
    )
