"""The key-value cache of a network under ONNX Runtime on a CPU."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mpt_trt.kv_cache import QUANTIZED_TYPES, CacheShape, cache_names
from mpt_trt.quantization.scheme import KvCacheType

Binding = onnxruntime.IOBinding


class BoundCache(Protocol):
    """A cache whose buffers are bound to a session."""

    def start(self, batch_size: int) -> None:
        """Makes it `batch_size` empty rows."""
        ...

    def before_step(self, seq: int) -> None:
        """Prepares for a step of `seq` tokens a row."""
        ...

    def after_step(self, write_positions: NDArray[np.int64]) -> None:
        """Takes in what the step has computed."""
        ...

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Row i becomes a copy of old row rows[i]."""
        ...


class InPlaceCache:
    """Each buffer is input and output at once."""

    def __init__(self, session: onnxruntime.InferenceSession, binding: Binding):
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self._inputs = {
            i.name: (tuple(i.shape[1:]), types[i.type])
            for i in session.get_inputs()
            if i.name.startswith("past_")
        }
        self._binding = binding
        self._buffers: dict[str, onnxruntime.OrtValue] = {}

    def start(self, batch_size: int) -> None:
        self._bind(
            {
                name: np.zeros((batch_size, *shape), dtype)
                for name, (shape, dtype) in self._inputs.items()
            }
        )

    def before_step(self, seq: int) -> None:
        pass

    def after_step(self, write_positions: NDArray[np.int64]) -> None:
        pass

    def reorder(self, rows: NDArray[np.int64]) -> None:
        old = {name: value.numpy() for name, value in self._buffers.items()}
        self._bind({name: value[rows] for name, value in old.items()})

    def _bind(self, contents: dict[str, NDArray]) -> None:
        self._buffers = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value)
            for name, value in contents.items()
        }
        for name, value in self._buffers.items():
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_", "present_", 1), value)


class CopiedCache:
    """A quantized cache; what a step computes is copied into it afterwards.

    All layers' keys and values are one array, `[2 * layers, rows, kv_heads, cache_len, head_dim]`,
    and those of a step another, so that a row takes one copy.
    """

    def __init__(self, binding: Binding, shape: CacheShape, cache_type: KvCacheType):
        self._binding, self._shape = binding, shape
        self._element_type = QUANTIZED_TYPES[cache_type][0]
        self._buffers = self._new = np.zeros(0, np.uint8)

    def start(self, batch_size: int) -> None:
        self._buffers = self._array(batch_size, self._shape.cache_len)
        self._bind_buffers()

    def before_step(self, seq: int) -> None:
        rows = self._buffers.shape[1]
        if self._new.shape[1:2] + self._new.shape[3:4] != (rows, seq):
            self._new = self._array(rows, seq)
            for name, part in self._named("new", self._new):
                self._binding.bind_ortvalue_output(name, part)

    def after_step(self, write_positions: NDArray[np.int64]) -> None:
        seq = self._new.shape[3]
        for row, start in enumerate(write_positions):
            self._buffers[:, row, :, start : start + seq] = self._new[:, row]

    def reorder(self, rows: NDArray[np.int64]) -> None:
        self._buffers = self._buffers[:, rows]
        self._bind_buffers()

    def _array(self, rows: int, positions: int) -> NDArray[np.uint8]:
        shape = self._shape
        return np.zeros(
            (2 * shape.num_layers, rows, shape.num_kv_heads, positions, shape.head_dim), np.uint8
        )

    def _bind_buffers(self) -> None:
        for name, part in self._named("past", self._buffers):
            self._binding.bind_ortvalue_input(name, part)

    def _named(self, age: str, array: NDArray[np.uint8]) -> list[tuple[str, onnxruntime.OrtValue]]:
        """The network's names of the parts of an array, and the parts, in its memory."""
        names = cache_names(age, self._shape.num_layers)
        of = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
        return [
            (name, of(part, self._element_type)) for name, part in zip(names, array, strict=True)
        ]


def make_bound_cache(
    session: onnxruntime.InferenceSession,
    binding: Binding,
    shape: CacheShape,
    cache_type: KvCacheType,
) -> BoundCache:
    if cache_type == "auto":
        return InPlaceCache(session, binding)
    return CopiedCache(binding, shape, cache_type)
