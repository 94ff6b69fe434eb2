"""Reads a network's weights: parts of files next to the graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpt_trt.network.external_files import FilePart, file_part
from mpt_trt.network.graph import external_tensor


@dataclass(frozen=True)
class SharedWeight:
    """A weight that is passed to sessions.

    element_type: ONNX type. content: the bytes in a file, or a function that computes them.
    """

    name: str
    element_type: int
    shape: tuple[int, ...]
    content: FilePart | Callable[[], NDArray]

    @property
    def size(self) -> int:
        """Bytes in memory."""
        itemsize = helper.tensor_dtype_to_np_dtype(self.element_type).itemsize
        return math.prod(self.shape) * itemsize

    def read(self) -> NDArray:
        """Reads the weight's bytes into a contiguous array."""
        content = self.content
        return content.read() if isinstance(content, FilePart) else content()

    def as_value(self) -> onnxruntime.OrtValue:
        """Reads the weight into host memory as a value of ONNX Runtime."""
        dtype = helper.tensor_dtype_to_np_dtype(self.element_type)
        content = self.read().reshape(-1).view(dtype).reshape(self.shape)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(content, self.element_type)


def left_out(weight: SharedWeight) -> TensorProto:
    """Makes an initializer without content, which the loader provides."""
    location = "given when the network is loaded"
    return external_tensor(weight.name, weight.element_type, weight.shape, location)


def map_tensor(tensor: TensorProto, folder: Path) -> NDArray:
    """Maps an external initializer into memory. The type must have whole bytes."""
    stored = file_part(tensor, folder)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(stored.path, dtype, "r", offset=stored.offset, shape=tuple(tensor.dims))
