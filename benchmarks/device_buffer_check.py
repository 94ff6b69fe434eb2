"""Tries, on any CUDA GPU, the part of the TensorRT runtime that needs no TensorRT: its buffers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow_scripts"))

from cuda.bindings import runtime as cudart

from mpt_trt.engines.tensorrt_runtime import DeviceBuffer, _call


def main() -> None:
    stream = _call(cudart.cudaStreamCreate())
    source = np.arange(1000, dtype=np.int64)
    first, second = DeviceBuffer(source.nbytes), DeviceBuffer(source.nbytes)
    result = np.full_like(source, -1)
    second.copy_to(result, stream)
    _call(cudart.cudaStreamSynchronize(stream))
    assert not result.any(), "a new buffer is not zero"
    first.copy_from(source, stream)
    second.copy_part(800, first, 8, 80, stream)
    second.copy_to(result, stream)
    _call(cudart.cudaStreamSynchronize(stream))
    expected = np.zeros_like(source)
    expected[100:110] = source[1:11]
    assert np.array_equal(result, expected), "copies went wrong"
    print("buffers work")


if __name__ == "__main__":
    main()
