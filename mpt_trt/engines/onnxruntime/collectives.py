"""DistCollective nodes under ONNX Runtime: Python operators that let the ranks meet over MPI.

ONNX Runtime does not know DistCollective. When a graph is loaded, each such node becomes an
operator of onnxruntime-extensions that calls the communicator. Those operators take float32 only,
so there is a Cast on either side.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mpt_trt.network.graph import COLLECTIVE
from mpt_trt.system.mpi import Communicator

DOMAIN = "ai.onnx.contrib"
OPERATORS = {b"all_reduce": "MptTrtAllReduce", b"all_gather": "MptTrtAllGather"}

Array = NDArray[np.float32]


class Collectives:
    """The collectives of one session.

    An exception must not cross ONNX Runtime's frames: it would end the process on the spot. So the
    first one is kept, the rest of the step runs on zeros, and `step` raises at the end.
    """

    def __init__(self, communicator: Communicator):
        self._communicator = communicator
        self._failure: BaseException | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a run of the session. Raises what went wrong where ranks met."""
        token = _running.set(self)
        try:
            with self._communicator.deferred_interrupts():
                yield
        finally:
            _running.reset(token)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def all_reduce(self, value: Array) -> Array:
        return self._meet(self._communicator.all_reduce, value, value.shape)

    def all_gather(self, value: Array) -> Array:
        shape = (len(value) * self._communicator.size, *value.shape[1:])
        return self._meet(self._communicator.all_gather, value, shape)

    def _meet(self, action: Callable[[Array], Array], value: Array, shape: tuple) -> Array:
        if self._failure is None:
            try:
                return action(value)
            except BaseException as error:
                self._failure = error
        return np.zeros(shape, np.float32)


# Whose step runs: an operator is one of the process, not of a session.
_running: ContextVar[Collectives] = ContextVar("running")


def replace_collectives(model: onnx.ModelProto, options: onnxruntime.SessionOptions) -> None:
    """Makes the graph's collectives operators, which run within Collectives.step."""
    options.register_custom_ops_library(_library())
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    nodes = [new for node in model.graph.node for new in _replaced(node, types)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


@cache
def _library() -> str:
    """Path of onnxruntime-extensions, with the operators registered.

    Only once a process: a second time crashes it.
    """
    extensions = _import_extensions()
    number = extensions.PyCustomOpDef.dt_float
    types = {"inputs": [number], "outputs": [number]}

    @extensions.onnx_op(op_type=OPERATORS[b"all_reduce"], **types)
    def all_reduce(value: Array) -> Array:
        return _running.get().all_reduce(value)

    @extensions.onnx_op(op_type=OPERATORS[b"all_gather"], **types)
    def all_gather(value: Array) -> Array:
        return _running.get().all_gather(value)

    return extensions.get_library_path()


def _import_extensions() -> ModuleType:
    """onnxruntime_extensions, without the packages of which it only converts tokenizers.

    They take seconds to import, in every rank; it does without them where they are not installed.
    """
    hidden = [name for name in ("torch", "transformers") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        import onnxruntime_extensions
    finally:
        for name in hidden:
            del sys.modules[name]
    return onnxruntime_extensions


def _replaced(node: onnx.NodeProto, types: dict[str, int]) -> list[onnx.NodeProto]:
    if node.op_type != COLLECTIVE:
        return [node]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    operator = OPERATORS[attributes["collective_operation"]]
    before, after = f"{node.name}/float", f"{node.name}/met"
    return [
        helper.make_node("Cast", node.input, [before], to=TensorProto.FLOAT),
        helper.make_node(operator, [before], [after], name=node.name, domain=DOMAIN),
        helper.make_node("Cast", [after], node.output, to=types[node.output[0]]),
    ]
