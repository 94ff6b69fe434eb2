"""Casts, transposes and checks blocks of weights at memory speed, without PyTorch's start-up time.

bfloat16 is `ml_dtypes.bfloat16`. All functions work on blocks that fit into the processor's cache,
and release Python's lock.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
from numpy.typing import NDArray

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
# Storage types of weights.
STORAGE_TYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}
# Bits of the exponent; all of them are 1 only in infinities and NaNs.
EXPONENTS: dict[np.dtype[Any], np.unsignedinteger[Any]] = {
    np.dtype(np.float16): np.uint16(0x7C00),
    BFLOAT16: np.uint16(0x7F80),
    np.dtype(np.float32): np.uint32(0x7F800000),
    np.dtype(np.float64): np.uint64(0x7FF0000000000000),
}
# ONNX models of one node, made by tools/make_kernels.py.
KERNELS = Path(__file__).with_name("kernels")
# ONNX's number for bfloat16 (TensorProto.DataType).
ONNX_BFLOAT16 = 16
# Number of values per pass of a two-step cast, so that intermediate values stay in the cache.
TWO_STEP_VALUES = 1 << 17


def is_finite(values: NDArray[Any]) -> bool:
    """Returns whether all elements are finite.

    As integers, the bits of NaNs and infinities exceed those of all finite values of the same sign,
    so two maxima suffice, without a temporary array.
    """
    exponent = EXPONENTS[values.dtype]
    sign = exponent.dtype.type(1 << (8 * exponent.itemsize - 1))
    signed = values.view(f"i{exponent.itemsize}").max(initial=0)
    return bool(signed < exponent and values.view(exponent.dtype).max(initial=0) < sign | exponent)


def convert(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Casts to another floating-point type, rounding to nearest, ties to even.

    Values beyond the type's range become infinities. The values must be finite.
    """
    if values.dtype == dtype:
        return values
    converted = np.empty(values.shape, dtype)
    if values.size:
        conversion(np.ascontiguousarray(values), converted)()
    return converted


def conversion(source: NDArray[Any], target: NDArray[Any]) -> Callable[[], None]:
    """Makes a function that fills `target` with the current content of `source`, like `convert`.

    Both are contiguous, of the same shape and of different types.
    """
    values, rounded = source.reshape(-1), target.reshape(-1)
    if values.dtype == np.float64:
        return functools.partial(_round_doubles, values, rounded)
    if np.float32 in (values.dtype, rounded.dtype):
        return _bound(_kernel(f"cast_{values.dtype.name}_to_{rounded.dtype.name}"), values, rounded)
    # Only the casts from and to float32 are vectorized.
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
    """Transposes a contiguous block `[a, b]` to a contiguous `[b, a]`.

    ONNX Runtime's kernel is several times faster than NumPy's copy.
    """
    target = np.empty(block.shape[::-1], block.dtype)
    transposition(block[None], target[None])()
    return target


def transposition(blocks: NDArray[Any], targets: NDArray[Any]) -> Callable[[], None]:
    """Makes a function that fills `targets` `[n, b, a]` with the current `blocks` `[n, a, b]`.

    Both are contiguous.
    """
    unsigned = np.dtype(f"u{blocks.itemsize}")
    return _bound(
        _kernel(f"transpose_{unsigned.name}"), blocks.view(unsigned), targets.view(unsigned)
    )


def _bound(
    session: onnxruntime.InferenceSession, source: NDArray[Any], target: NDArray
) -> Callable[[], None]:
    """Makes a function that computes `target` from the current content of `source`."""
    binding = session.io_binding()
    binding.bind_ortvalue_input("source", _as_runtime_value(source))
    binding.bind_ortvalue_output("target", _as_runtime_value(target))
    return functools.partial(session.run_with_iobinding, binding)


def _as_runtime_value(values: NDArray[Any]) -> onnxruntime.OrtValue:
    of = onnxruntime.OrtValue
    if values.dtype != BFLOAT16:
        return of.ortvalue_from_numpy(values)
    return of.ortvalue_from_numpy_with_onnx_type(values.view(np.uint16), ONNX_BFLOAT16)


@functools.cache
def _kernel(name: str) -> onnxruntime.InferenceSession:
    return one_thread_session((KERNELS / f"{name}.onnx").read_bytes())


def one_thread_session(model: bytes) -> onnxruntime.InferenceSession:
    """Makes a session of a serialized network that computes only in the calling thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options)
