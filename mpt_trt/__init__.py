"""Builds verified TensorRT engines from Hugging Face MPT checkpoints."""

import os

__version__ = "0.9.0"

# Must be set before ONNX Runtime is imported. Otherwise ONNX Runtime sends usage data to its
# makers: it keeps a database in the user's cache folder, waits at exit until it is on disk, and
# sends it over the network.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
