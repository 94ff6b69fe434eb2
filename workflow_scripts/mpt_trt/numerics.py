"""What conversion does to blocks of weights, at memory speed and without PyTorch's start-up time.

bfloat16 is `ml_dtypes.bfloat16`. Everything here works on blocks that fit into the processor's
cache and lets other Python threads run meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

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
OPSET, IR_VERSION = 21, 10


def is_finite(values: NDArray) -> bool:
    """Whether no element is a NaN or an infinity.

    Their bits, as integers, are above those of all finite values of the same sign: two maxima need
    no temporary array.
    """
    exponent = EXPONENTS[values.dtype]
    sign = exponent.dtype.type(1 << (8 * exponent.itemsize - 1))
    signed = values.view(f"i{exponent.itemsize}").max(initial=0)
    return bool(signed < exponent and values.view(exponent.dtype).max(initial=0) < sign | exponent)


def convert(values: NDArray, dtype: np.dtype) -> NDArray:
    """`values` in another floating-point type, rounded to nearest, ties to even.

    What is beyond the type's range becomes an infinity. The values must be finite.
    """
    if values.dtype == dtype:
        return values
    if values.dtype == np.float64:
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    if values.dtype != np.float32 and dtype != np.float32:
        # Each step has a vectorized kernel, the way from one half type to the other has none.
        values = convert(values, np.dtype(np.float32))
    converted = np.empty(values.shape, dtype)
    if values.size:
        source = np.ascontiguousarray(values).reshape(-1)
        _bound(_caster(values.dtype, dtype), source, converted.reshape(-1))()
    return converted


def transpose(block: NDArray, target: NDArray) -> None:
    """Fills the contiguous `target` `[b, a]` with the contiguous `block` `[a, b]`, transposed.

    ONNX Runtime's kernel does it several times faster than NumPy's copy.
    """
    transposition(block, target)()


def transposition(block: NDArray, target: NDArray) -> Callable[[], None]:
    """A function that does `transpose` with what `block` holds when it is called."""
    unsigned = np.dtype(f"u{block.itemsize}")
    return _bound(_transposer(unsigned), block.view(unsigned), target.view(unsigned))


def _bound(
    session: onnxruntime.InferenceSession, source: NDArray, target: NDArray
) -> Callable[[], None]:
    """A function that computes `target` from `source`, both contiguous."""
    binding = session.io_binding()
    binding.bind_ortvalue_input("source", _as_runtime_value(source))
    binding.bind_ortvalue_output("target", _as_runtime_value(target))
    return functools.partial(session.run_with_iobinding, binding)


def _as_runtime_value(values: NDArray) -> onnxruntime.OrtValue:
    of = onnxruntime.OrtValue
    if values.dtype != BFLOAT16:
        return of.ortvalue_from_numpy(values)
    return of.ortvalue_from_numpy_with_onnx_type(values.view(np.uint16), TensorProto.BFLOAT16)


@functools.cache
def _transposer(dtype: np.dtype) -> onnxruntime.InferenceSession:
    node = helper.make_node("Transpose", ["source"], ["target"], perm=[1, 0])
    return _session(node, (dtype, ["a", "b"]), (dtype, ["b", "a"]))


@functools.cache
def _caster(source: np.dtype, target: np.dtype) -> onnxruntime.InferenceSession:
    to = helper.np_dtype_to_tensor_dtype(target)
    node = helper.make_node("Cast", ["source"], ["target"], to=to)
    return _session(node, (source, ["a"]), (target, ["a"]))


def _session(
    node: NodeProto, source: tuple[np.dtype, list[str]], target: tuple[np.dtype, list[str]]
) -> onnxruntime.InferenceSession:
    """A network of one node; each caller's thread computes by itself."""

    def value(name: str, dtype: np.dtype, shape: list[str]) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)

    graph = helper.make_graph([node], "step", [value("source", *source)], [value("target", *target)])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)
