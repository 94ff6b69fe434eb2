"""The first test of TensorRT plans on a GPU: `make test-tensorrt`.

It builds and runs every variant and every feature at small sizes, with tokens chosen by the host
and by the GPU. It compares them with ONNX Runtime and with the float32 reference, checks the calls
against the rules of TensorRT's documentation, measures the speed of two models, and writes a
report.
"""
