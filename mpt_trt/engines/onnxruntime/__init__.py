"""Runtime of a rank's network: ONNX Runtime on a CPU, and on a GPU in `cuda`."""
