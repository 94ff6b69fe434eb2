"""Where a network's weights lie: parts of files beside the graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper


@dataclass(frozen=True)
class StoredBytes:
    """A part of a file."""

    path: Path
    offset: int
    size: int

    def read(self) -> NDArray[np.uint8]:
        return np.fromfile(self.path, np.uint8, self.size, offset=self.offset)


@dataclass(frozen=True)
class SharedWeight:
    """A weight that sessions are given.

    element_type: ONNX's. content: its bytes, or what makes them.
    """

    name: str
    element_type: int
    shape: tuple[int, ...]
    content: StoredBytes | Callable[[], NDArray]

    @property
    def size(self) -> int:
        itemsize = helper.tensor_dtype_to_np_dtype(self.element_type).itemsize
        return math.prod(self.shape) * itemsize

    def read(self) -> NDArray:
        """The weight's bytes in a contiguous array."""
        found = self.content
        return found.read() if isinstance(found, StoredBytes) else found()

    def as_value(self) -> onnxruntime.OrtValue:
        """In host memory."""
        dtype = helper.tensor_dtype_to_np_dtype(self.element_type)
        content = self.read().reshape(-1).view(dtype).reshape(self.shape)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(content, self.element_type)


def stored_bytes(tensor: TensorProto, folder: Path) -> StoredBytes:
    """The content of an external initializer. folder: that of the network."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    path = folder / place["location"]
    offset = int(place.get("offset", 0))
    return StoredBytes(path, offset, int(place.get("length", path.stat().st_size - offset)))


def map_tensor(tensor: TensorProto, folder: Path) -> NDArray:
    """An external initializer, mapped into memory. Not for types of less than a byte."""
    stored = stored_bytes(tensor, folder)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(stored.path, dtype, "r", offset=stored.offset, shape=tuple(tensor.dims))
