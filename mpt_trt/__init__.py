"""From a Hugging Face MPT checkpoint to verified TensorRT engines."""

import os

__version__ = "0.9.0"

# Unless this is set before its import, ONNX Runtime reports to its makers what it is used for: it
# keeps a database in the user's cache folder, waits at a program's end for the disk to have it, and
# sends it over the network.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
