"""Where a network's weights lie: parts of files beside the graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
