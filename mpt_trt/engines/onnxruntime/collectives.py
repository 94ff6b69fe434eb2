"""DistCollective nodes under ONNX Runtime: Python operators that exchange values over MPI.

ONNX Runtime has no DistCollective. When a graph is loaded, each such node becomes an operator of
onnxruntime-extensions that calls the communicator. These operators support only float32, so there
is a Cast before and after each.
"""

from __future__ import annotations

import importlib
import importlib.util
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

from mpt_trt.errors import MptTrtError
from mpt_trt.network.graph import COLLECTIVE
from mpt_trt.system.mpi import Communicator

DOMAIN = "ai.onnx.contrib"
OPERATORS = {b"all_reduce": "MptTrtAllReduce", b"all_gather": "MptTrtAllGather"}

Array = NDArray[np.float32]


class Collectives:
    """Collectives of one session.

    An exception that crosses ONNX Runtime's frames ends the process. So the first exception is
    stored, the rest of the step computes with zeros, and `step` raises the exception at the end.
    """

    def __init__(self, communicator: Communicator):
        self._communicator = communicator
        self._failure: BaseException | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Encloses a run of the session; raises the first error of its collectives."""
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
        """Returns the sum of all ranks' values, or zeros after an error."""
        return self._call(self._communicator.all_reduce, value, value.shape)

    def all_gather(self, value: Array) -> Array:
        """Joins all ranks' values along the first axis; returns zeros after an error."""
        shape = (len(value) * self._communicator.size, *value.shape[1:])
        return self._call(self._communicator.all_gather, value, shape)

    def _call(self, action: Callable[[Array], Array], value: Array, shape: tuple) -> Array:
        if self._failure is None:
            try:
                return action(value)
            except BaseException as error:
                self._failure = error
        return np.zeros(shape, np.float32)


# The session that runs a step, because operators belong to the process, not to a session.
_running: ContextVar[Collectives] = ContextVar("running")


def replace_collectives(model: onnx.ModelProto, options: onnxruntime.SessionOptions) -> None:
    """Replaces the graph's collectives with operators, which run within Collectives.step."""
    options.register_custom_ops_library(_library())
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    nodes = [new for node in model.graph.node for new in _replaced(node, types)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


@cache
def _library() -> str:
    """Registers the operators and returns the path of onnxruntime-extensions' library.

    Runs once per process, because a second registration crashes it.
    """
    operators = _import_operators()
    number = operators.PyCustomOpDef.dt_float
    types = {"inputs": [number], "outputs": [number]}
    declare = operators.Opdef.declare

    @declare(op_type=OPERATORS[b"all_reduce"], **types)
    def all_reduce(value: Array) -> Array:
        return _running.get().all_reduce(value)

    @declare(op_type=OPERATORS[b"all_gather"], **types)
    def all_gather(value: Array) -> Array:
        return _running.get().all_gather(value)

    return operators.get_library_path()


def _import_operators() -> ModuleType:
    """Imports onnxruntime-extensions' module for operators in Python, without the package.

    The package also converts tokenizers. For that it imports torch and transformers, which takes
    seconds in every rank.
    """
    spec = importlib.util.find_spec("onnxruntime_extensions")
    if spec is None:
        raise MptTrtError(
            "onnxruntime-extensions is not installed, and several ranks under ONNX Runtime need it;"
            " install requirements.txt"
        )
    # An empty package object, so that its modules are found without running the package.
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{spec.name}._ocos")
    finally:
        del sys.modules[spec.name]


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
