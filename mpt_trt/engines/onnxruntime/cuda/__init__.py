"""Running a rank's network under ONNX Runtime on a GPU."""
