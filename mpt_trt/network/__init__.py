"""The ONNX graph of one rank and the content of its weights."""
