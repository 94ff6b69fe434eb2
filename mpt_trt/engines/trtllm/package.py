"""Finds the installed TensorRT-LLM, without importing it, and checks its version."""

from __future__ import annotations

import re
import shutil
from importlib import metadata

from mpt_trt.errors import MptTrtError

DISTRIBUTION = "tensorrt_llm"
BUILDER = "trtllm-build"
FIRST, REMOVED = (0, 20), (1, 3)
"""First version that reads these checkpoints, and first version without a TensorRT backend."""

REMEDY = (
    "run the workflow with --sdm conda or --sdm apptainer, which take 1.2.1 from "
    "envs/tensorrt_llm.yaml or NVIDIA's container, or use backend tensorrt or tensorrt_rtx"
)


def require_tensorrt_llm() -> str:
    """Version of the installed TensorRT-LLM.

    Raises MptTrtError when it is missing, too old or too new.
    """
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise MptTrtError(
            f"backend = tensorrt_llm: TensorRT-LLM is not installed in this environment; {REMEDY}"
        ) from None
    match = re.match(r"([0-9]+)\.([0-9]+)", version)
    if match is None:
        raise _refused(version, f"is not a known version; {REMEDY}")
    release = (int(match[1]), int(match[2]))
    if release < FIRST:
        raise _refused(version, f"is older than {_words(FIRST)}, the first that is supported")
    if release >= REMOVED:
        raise _refused(
            version,
            "has no TensorRT backend: the TensorRT backend was removed; use backend tensorrt, or "
            "TensorRT-LLM 1.2.1",
        )
    return version


def builder_path() -> str:
    """Path of `trtllm-build`; raises MptTrtError when it is missing."""
    path = shutil.which(BUILDER)
    if path is None:
        raise MptTrtError(f"{BUILDER}: not found, although TensorRT-LLM is installed; {REMEDY}")
    return path


def _refused(version: str, why: str) -> MptTrtError:
    return MptTrtError(f"backend = tensorrt_llm: TensorRT-LLM {version} {why}")


def _words(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
