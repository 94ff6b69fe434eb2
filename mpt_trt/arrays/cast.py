"""What conversion does to blocks of weights, at memory speed and without PyTorch's start-up time.

bfloat16 is `ml_dtypes.bfloat16`. Everything here works on blocks that fit into the processor's
cache and lets other Python threads run meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
from numpy.typing import NDArray

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
# The types in which weights are stored.
STORAGE_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}
# The bits of the exponent, which are all ones only in infinities and NaNs.
EXPONENTS: dict[np.dtype[Any], np.unsignedinteger[Any]] = {
    np.dtype(np.float16): np.uint16(0x7C00),
    BFLOAT16: np.uint16(0x7F80),
    np.dtype(np.float32): np.uint32(0x7F800000),
    np.dtype(np.float64): np.uint64(0x7FF0000000000000),
}
# ONNX's numbers of types.
ELEMENT_TYPES = {
    np.dtype(np.float32): 1,
    np.dtype(np.uint8): 2,
    np.dtype(np.uint16): 4,
    np.dtype(np.float16): 10,
    np.dtype(np.float64): 11,
    np.dtype(np.uint32): 12,
    np.dtype(np.uint64): 13,
    BFLOAT16: 16,
}
OPSET, IR_VERSION = 21, 10
# Values that are rounded at a time where it takes two steps: what is between stays in the cache.
TWO_STEP_VALUES = 1 << 17


def is_finite(values: NDArray[Any]) -> bool:
    """Whether no element is a NaN or an infinity.

    Their bits, as integers, are above those of all finite values of the same sign: two maxima need
    no temporary array.
    """
    exponent = EXPONENTS[values.dtype]
    sign = exponent.dtype.type(1 << (8 * exponent.itemsize - 1))
    signed = values.view(f"i{exponent.itemsize}").max(initial=0)
    return bool(signed < exponent and values.view(exponent.dtype).max(initial=0) < sign | exponent)


def convert(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`values` in another floating-point type, rounded to nearest, ties to even.

    What is beyond the type's range becomes an infinity. The values must be finite.
    """
    if values.dtype == dtype:
        return values
    converted = np.empty(values.shape, dtype)
    if values.size:
        conversion(np.ascontiguousarray(values), converted)()
    return converted


def conversion(source: NDArray[Any], target: NDArray[Any]) -> Callable[[], None]:
    """A function that fills `target` with what `source` holds by then, rounded as by `convert`.

    Both are contiguous, of one shape and of two types.
    """
    values, rounded = source.reshape(-1), target.reshape(-1)
    if values.dtype == np.float64:
        return functools.partial(_round_doubles, values, rounded)
    if np.float32 in (values.dtype, rounded.dtype):
        return _bound(_caster(values.dtype, rounded.dtype), values, rounded)
    # Each step has a vectorized kernel, the way from one half type to the other has none.
    between = np.empty(min(values.size, TWO_STEP_VALUES), np.float32)
    steps: list[Callable[[], None]] = []
    for start in range(0, values.size, len(between)):
        part = values[start : start + len(between)]
        floats = between[: len(part)]
        steps.append(conversion(part, floats))
        steps.append(conversion(floats, rounded[start : start + len(between)]))
    return functools.partial(_in_turn, steps)


def _round_doubles(values: NDArray[Any], rounded: NDArray[Any]) -> None:
    with np.errstate(over="ignore"):
        rounded[...] = values.astype(rounded.dtype)


def _in_turn(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()


def transposed_copy(block: NDArray[Any]) -> NDArray[Any]:
    """A contiguous `[b, a]` of the contiguous `block` `[a, b]`.

    ONNX Runtime's kernel does it several times faster than NumPy's copy.
    """
    target = np.empty(block.shape[::-1], block.dtype)
    transposition(block[None], target[None])()
    return target


def transposition(blocks: NDArray[Any], targets: NDArray[Any]) -> Callable[[], None]:
    """A function that fills `targets` `[n, b, a]` with what `blocks` `[n, a, b]` holds by then.

    Both are contiguous.
    """
    unsigned = np.dtype(f"u{blocks.itemsize}")
    return _bound(_transposer(unsigned), blocks.view(unsigned), targets.view(unsigned))


def _bound(
    session: onnxruntime.InferenceSession, source: NDArray[Any], target: NDArray
) -> Callable[[], None]:
    """A function that computes `target` from `source`, both contiguous."""
    binding = session.io_binding()
    binding.bind_ortvalue_input("source", _as_runtime_value(source))
    binding.bind_ortvalue_output("target", _as_runtime_value(target))
    return functools.partial(session.run_with_iobinding, binding)


def _as_runtime_value(values: NDArray[Any]) -> onnxruntime.OrtValue:
    of = onnxruntime.OrtValue
    if values.dtype != BFLOAT16:
        return of.ortvalue_from_numpy(values)
    return of.ortvalue_from_numpy_with_onnx_type(values.view(np.uint16), ELEMENT_TYPES[BFLOAT16])


@functools.cache
def _transposer(dtype: np.dtype[Any]) -> onnxruntime.InferenceSession:
    axes = b"".join(_field(8, axis) for axis in (0, 2, 1))
    permutation = _field(5, _field(1, b"perm") + axes + _field(20, 7))
    return _session(b"Transpose", permutation, (dtype, b"nab"), (dtype, b"nba"))


@functools.cache
def _caster(source: np.dtype[Any], target: np.dtype[Any]) -> onnxruntime.InferenceSession:
    to = _field(5, _field(1, b"to") + _field(3, ELEMENT_TYPES[target]) + _field(20, 2))
    return _session(b"Cast", to, (source, b"a"), (target, b"a"))


def _session(
    operator: bytes,
    attribute: bytes,
    source: tuple[np.dtype, bytes],
    target: tuple[np.dtype, bytes],
) -> onnxruntime.InferenceSession:
    """A network of one node.

    source, target: type, and a letter for each dimension. Put together by hand (field numbers:
    onnx.proto3), since importing `onnx` takes as long as converting 0.1 GB.
    """
    node = _field(1, b"source") + _field(2, b"target") + _field(4, operator) + attribute
    inputs, outputs = _value(b"source", *source), _value(b"target", *target)
    graph = _field(1, node) + _field(2, b"step") + _field(11, inputs) + _field(12, outputs)
    model = _field(1, IR_VERSION) + _field(7, graph) + _field(8, _field(2, OPSET))
    return one_thread_session(model)


def one_thread_session(model: bytes) -> onnxruntime.InferenceSession:
    """Runs a serialized network in the thread that calls, however many there are of those."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options)


def _value(name: bytes, dtype: np.dtype[Any], dimensions: bytes) -> bytes:
    """A ValueInfoProto."""
    shape = b"".join(_field(1, _field(2, bytes([letter]))) for letter in dimensions)
    tensor_type = _field(1, ELEMENT_TYPES[dtype]) + _field(2, shape)
    return _field(1, name) + _field(2, _field(1, tensor_type))


def _field(number: int, content: int | bytes) -> bytes:
    """A field of a protobuf message: a number, or bytes with their length."""
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80, *_varint(high)]) if high else bytes([low])
