"""What conversion does to blocks of weights, at memory speed and without PyTorch's start-up time.

bfloat16 is `ml_dtypes.bfloat16`. Everything here works on blocks that fit into the processor's
cache and lets other Python threads run meanwhile.
"""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The types in which weights are stored.
STORAGE_TYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}
# The bits of the exponent; they are all ones in infinities and NaNs alone.
EXPONENTS = {
    np.dtype(np.float16): np.uint16(0x7C00),
    BFLOAT16: np.uint16(0x7F80),
    np.dtype(np.float32): np.uint32(0x7F800000),
    np.dtype(np.float64): np.uint64(0x7FF0000000000000),
}
UNSIGNED = {
    1: TensorProto.UINT8,
    2: TensorProto.UINT16,
    4: TensorProto.UINT32,
    8: TensorProto.UINT64,
}
OPSET, IR_VERSION = 21, 10


def is_finite(values: NDArray) -> bool:
    """Whether no element is a NaN or an infinity."""
    exponent = EXPONENTS[values.dtype]
    return bool((values.view(exponent.dtype) & exponent).max(initial=0) != exponent)


def convert(values: NDArray, dtype: np.dtype) -> NDArray:
    """`values` in another floating-point type, rounded to nearest, ties to even.

    What is beyond the type's range becomes an infinity. The values must be finite.
    """
    if values.dtype == dtype:
        return values
    if values.dtype == BFLOAT16:
        wide = values.view(np.uint16).astype(np.uint32)
        wide <<= np.uint32(16)
        return convert(wide.view(np.float32), dtype)
    with np.errstate(over="ignore"):
        if dtype != BFLOAT16:
            return values.astype(dtype)
        if values.dtype == np.float64:
            return values.astype(BFLOAT16)
        bits = values.astype(np.float32, copy=False).view(np.uint32)
    # The upper half, after adding what carries into it when the lower half is above its middle, or
    # at the middle with an odd upper half.
    carry = (bits >> np.uint32(16)) & np.uint32(1)
    carry += np.uint32(0x7FFF)
    carry += bits
    carry >>= np.uint32(16)
    return carry.astype(np.uint16).view(BFLOAT16)


def transpose(block: NDArray, target: NDArray) -> None:
    """Fills the contiguous `target` `[b, a]` with the contiguous `block` `[a, b]`, transposed.

    ONNX Runtime's kernel does it several times faster than NumPy's copy.
    """
    session = _transposer(block.itemsize)
    binding = session.io_binding()
    unsigned = np.dtype(f"u{block.itemsize}")
    of = onnxruntime.OrtValue.ortvalue_from_numpy
    binding.bind_ortvalue_input("block", of(block.view(unsigned)))
    binding.bind_ortvalue_output("transposed", of(target.view(unsigned)))
    session.run_with_iobinding(binding)


@functools.cache
def _transposer(itemsize: int) -> onnxruntime.InferenceSession:
    """A network that transposes; each caller's thread computes by itself."""
    node = helper.make_node("Transpose", ["block"], ["transposed"], perm=[1, 0])
    element_type = UNSIGNED[itemsize]
    graph = helper.make_graph(
        [node],
        "transpose",
        [helper.make_tensor_value_info("block", element_type, ["a", "b"])],
        [helper.make_tensor_value_info("transposed", element_type, ["b", "a"])],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)
