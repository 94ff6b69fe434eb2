"""The GPU of this process."""

from __future__ import annotations

import os

from cuda.bindings import runtime as cudart

from mpt_trt.engines.cuda.memory import call
from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpus


def use_only(identifier: str) -> None:
    """Hides all GPUs but one from this process, in all of its threads.

    CUDA selects GPUs per thread, so any thread of a rank could use the first rank's GPU instead.

    Raises MptTrtError when CUDA has started before and sees other GPUs.
    """
    os.environ[gpus.VISIBLE] = identifier
    if (count := call(cudart.cudaGetDeviceCount())) != 1:
        raise MptTrtError(
            f"this process already uses CUDA, with {count} GPUs; load engines of several ranks "
            f"first, or set {gpus.VISIBLE} for each rank"
        )
