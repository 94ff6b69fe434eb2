"""Writes a safetensors file block by block, so that memory holds only one block.

The file contains the length of the header (uint64, little endian), the header (JSON with type,
shape and offsets of every tensor), and the tensors in C order without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import BFLOAT16
from mpt_trt.system.files import write_in_pieces

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
TYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    BFLOAT16: "BF16",
    np.dtype(np.int8): "I8",
    E4M3: "F8_E4M3",
}
HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is computed when it is written.

    blocks: yields successive parts of the flattened tensor in `dtype`.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[NDArray]]

    @property
    def byte_size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, tensors: Mapping[str, StreamedTensor]) -> None:
    """Writes the tensors, largest elements first, so that all elements are aligned.

    Raises ValueError when a tensor's blocks do not match its type or shape.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, start = {}, 0
    for name, tensor in ordered:
        stop = start + tensor.byte_size
        header[name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % HEADER_ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in ordered:
            written = 0
            for block in tensor.blocks():
                if block.dtype != tensor.dtype:
                    raise ValueError(f"{name}: a block of {block.dtype} for {tensor.dtype}")
                write_in_pieces(stream, np.ascontiguousarray(block).reshape(-1).view(np.uint8))
                written += block.nbytes
            if written != tensor.byte_size:
                raise ValueError(f"{name}: {written} bytes for {tensor.byte_size}")
