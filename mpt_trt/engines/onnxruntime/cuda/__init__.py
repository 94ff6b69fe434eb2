"""ONNX Runtime as the runtime of a network on a GPU."""
