"""Builds verified TensorRT engines from Hugging Face MPT checkpoints, and runs them.

`from mpt_trt import Engine` is the Python interface; see docs/python.md.
"""

import importlib
import os

__version__ = "0.9.0"

# Must be set before ONNX Runtime is imported. Otherwise ONNX Runtime sends usage data to its
# makers: it keeps a database in the user's cache folder, waits at exit until it is on disk, and
# sends it over the network.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Names of the Python interface by module; imported when they are used, because every tool imports
# this package.
_LAZY = {"Engine": "mpt_trt.api.engine", "MptTrtError": "mpt_trt.errors"}
__all__ = ["Engine", "MptTrtError", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
