"""Locates a network's weights: parts of files in the network's folder, and no others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpt_trt.errors import MptTrtError
from mpt_trt.system.inner_names import inner_path
from mpt_trt.system.json_text import shown

# Bits of ONNX types with less than a byte per element.
BITS: dict[int, int] = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.FLOAT4E2M1: 4}


@dataclass(frozen=True)
class FilePart:
    """A part of a file, in bytes."""

    path: Path
    offset: int
    size: int

    def read(self) -> NDArray[np.uint8]:
        """Reads the part, `[size]`."""
        return np.fromfile(self.path, np.uint8, self.size, offset=self.offset)


def read_network(path: Path) -> onnx.ModelProto:
    """Reads the graph of a network, without its weights.

    Raises MptTrtError, naming the network, when it cannot be read, or when a weight is outside of
    the files in the network's folder.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise MptTrtError(f"{path}: damaged ({error}); build the engine again") from None
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            file_part(tensor, path.parent, path)
    return model


def file_part(tensor: TensorProto, folder: Path, named_by: Path | None = None) -> FilePart:
    """Locates the content of an external tensor.

    folder: folder of the network. named_by: path of the network, for error messages.

    Raises MptTrtError when it is outside of the folder or of its file.
    """
    named_by = named_by or folder
    place = {entry.key: entry.value for entry in tensor.external_data}
    location = place.get("location", "")
    if not isinstance(location, str):  # protobuf returns text that is not UTF-8 as bytes
        raise _damaged(named_by, tensor, f"its location is {shown(location)}")
    path = inner_path(folder, location, named_by)
    if not path.is_file():
        raise MptTrtError(
            f"{path}: missing, though {named_by.name} names it; build the engine again"
        )
    try:
        needed = _byte_size(tensor)
        offset = int(place.get("offset", 0))
        length = int(place.get("length", needed))
    except (TypeError, ValueError, KeyError) as error:
        raise _damaged(named_by, tensor, shown(error)) from None
    size = path.stat().st_size
    if offset < 0 or length != needed or offset + length > size:
        raise _damaged(
            named_by,
            tensor,
            f"it has {needed} bytes, but its place is {length} bytes at {offset} in {path.name}, "
            f"which has {size}",
        )
    return FilePart(path, offset, length)


def _byte_size(tensor: TensorProto) -> int:
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"its shape is {list(tensor.dims)}")
    bits = (
        BITS.get(tensor.data_type) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    )
    return -(-math.prod(tensor.dims) * bits // 8)


def _damaged(named_by: Path, tensor: TensorProto, why: str) -> MptTrtError:
    return MptTrtError(
        f"{named_by}: damaged (weight {tensor.name[:80]!r}: {why}); build the engine again"
    )


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Yields every tensor of a model, including those in attributes of nodes and in subgraphs."""
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        yield from _tensors_of_nodes(function.node)


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _tensors_of_graph(graph)
