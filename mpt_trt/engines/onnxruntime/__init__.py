"""ONNX Runtime as the runtime of a rank's network: on a CPU, and in `cuda` on a GPU."""
