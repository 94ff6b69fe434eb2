"""GPU memory, graphs and the KV cache, shared by TensorRT and ONNX Runtime."""
