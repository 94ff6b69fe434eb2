"""Runtime of a network on a GPU: ONNX Runtime's CUDA provider."""
