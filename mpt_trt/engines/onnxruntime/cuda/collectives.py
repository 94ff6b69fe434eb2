"""DistCollective nodes on a GPU: operators that call NCCL on the session's stream.

ONNX Runtime has no DistCollective. When a graph is loaded, each such node becomes an operator of
`collectives.c`, which works in captured steps as well.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from mpt_trt.engines.cuda.nccl import nccl_obstacle
from mpt_trt.engines.onnxruntime.graph_editor import Graph, attributes
from mpt_trt.errors import MptTrtError
from mpt_trt.network.graph import COLLECTIVE, COLLECTIVE_DOMAIN
from mpt_trt.system.compiled import compiled_library

SOURCE = Path(__file__).with_name("collectives.c")
OPERATORS = {b"all_reduce": "AllReduce", b"all_gather": "AllGather"}


class _Group(ctypes.Structure):
    """The structure of the same name in `collectives.c`."""

    _fields_ = [
        ("communicator", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("all_reduce", ctypes.c_void_p),
        ("all_gather", ctypes.c_void_p),
        ("error_string", ctypes.c_void_p),
    ]


class CollectiveGroup:
    """The ranks among which a network's operators combine tensors.

    It must live as long as the sessions with these operators.
    """

    def __init__(self, size: int):
        """Makes a group of `size` ranks, which are not connected yet."""
        self._group = _Group(size=size)

    def connect(self, communicator: int, library: Any) -> None:
        """Sets the pointer of a communicator and the library with NCCL's functions."""
        for field, function in (
            ("all_reduce", library.ncclAllReduce),
            ("all_gather", library.ncclAllGather),
            ("error_string", library.ncclGetErrorString),
        ):
            setattr(self._group, field, ctypes.cast(function, ctypes.c_void_p).value)
        self._group.communicator = communicator

    def replace_collectives(self, model: onnx.ModelProto) -> None:
        """Replaces the graph's DistCollective nodes with operators of `operator_library`."""
        graph = Graph(model)
        address = ctypes.addressof(self._group)
        graph.store(
            {
                node.name: [_operator(node, address)]
                for node in graph.nodes
                if node.op_type == COLLECTIVE
            }
        )


def operator_library() -> Path:
    """Path of the library with the operators; raises MptTrtError if it cannot be compiled."""
    return compiled_library(SOURCE)


def collectives_obstacle() -> str | None:
    """Reason why ranks cannot communicate through their GPUs; None if they can."""
    if (obstacle := nccl_obstacle()) is not None:
        return obstacle
    try:
        operator_library()
    except MptTrtError as error:
        return str(error)
    return None


def _operator(node: onnx.NodeProto, group: int) -> onnx.NodeProto:
    operator = OPERATORS[attributes(node)["collective_operation"]]
    return helper.make_node(
        operator, node.input, node.output, node.name, domain=COLLECTIVE_DOMAIN, group=group
    )
