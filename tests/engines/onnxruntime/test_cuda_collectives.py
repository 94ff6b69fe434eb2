"""The operators of `collectives.c`, run by ONNX Runtime on a CPU with functions of their own."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mpt_trt.engines.onnxruntime.cuda import collectives
from mpt_trt.engines.onnxruntime.cuda.collectives import CollectiveGroup, operator_library
from mpt_trt.errors import MptTrtError
from mpt_trt.network.graph import COLLECTIVE, COLLECTIVE_DOMAIN
from support.simulated.nccl import AllGather, AllReduce, ErrorString

SIZE = 3
COMMUNICATOR = 0x1234
ELEMENT_BYTES = {7: 4, 6: 2, 9: 2}  # by ncclDataType_t
FORBIDDEN_COUNT = 77


def make_library(calls: list[tuple]) -> SimpleNamespace:
    """Functions with NCCL's signatures, as if all ranks held the same."""

    def all_reduce(send, recv, count, data_type, operation, communicator, stream) -> int:
        calls.append(("reduce", data_type, operation, communicator, stream))
        if send != recv:
            ctypes.memmove(recv, send, count * ELEMENT_BYTES[data_type])
        return 5 if count == FORBIDDEN_COUNT else 0

    def all_gather(send, recv, count, data_type, communicator, stream) -> int:
        calls.append(("gather", data_type, None, communicator, stream))
        for index in range(SIZE):
            size = count * ELEMENT_BYTES[data_type]
            ctypes.memmove(recv + index * size, send, size)
        return 0

    texts = [ctypes.create_string_buffer(f"error number {n}".encode()) for n in range(9)]
    return SimpleNamespace(
        ncclAllReduce=AllReduce(all_reduce),
        ncclAllGather=AllGather(all_gather),
        ncclGetErrorString=ErrorString(lambda number: ctypes.addressof(texts[number])),
    )


def make_model(element_type: int, operation: str, shape: list) -> onnx.ModelProto:
    """A collective node as networks have it, between two others."""
    nodes = [
        helper.make_node("Identity", ["x"], ["own"]),
        helper.make_node(
            COLLECTIVE,
            ["own"],
            ["met"],
            name="meeting",
            domain=COLLECTIVE_DOMAIN,
            collective_operation=operation,
            nb_rank=SIZE,
        ),
        helper.make_node("Identity", ["met"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", element_type, shape)],
        [helper.make_tensor_value_info("y", element_type, None)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(COLLECTIVE_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def open_session(model: onnx.ModelProto, group: CollectiveGroup) -> onnxruntime.InferenceSession:
    group.replace_collectives(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(operator_library()))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


TYPES = {TensorProto.FLOAT: (7, np.uint32), TensorProto.FLOAT16: (6, np.uint16)}
TYPES[TensorProto.BFLOAT16] = (9, np.uint16)


@pytest.mark.parametrize("element_type", TYPES)
@pytest.mark.parametrize("operation", ["all_reduce", "all_gather"])
def test_tensors_of_every_type_and_shape(operation, element_type):
    data_type, bits = TYPES[element_type]
    calls: list[tuple] = []
    group, library = CollectiveGroup(SIZE), make_library(calls)
    group.connect(COMMUNICATOR, library)
    session = open_session(make_model(element_type, operation, ["n", 7]), group)
    for rows in (1, 5, 0):
        raw = np.arange(rows * 7, dtype=bits).reshape(rows, 7)
        value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, element_type)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", value)
        binding.bind_output("y", "cpu")
        session.run_with_iobinding(binding)
        [found] = binding.get_outputs()
        copies = 1 if operation == "all_reduce" else SIZE
        assert found.shape() == [rows * copies, 7]
        assert found.element_type() == element_type
        if rows:
            address, size = found.data_ptr(), raw.nbytes * copies
            content = np.frombuffer((ctypes.c_uint8 * size).from_address(address), bits)
            assert np.array_equal(content, np.tile(raw, (copies, 1)).ravel())
    # An empty tensor needs no communication.
    kind, sum_ = ("reduce", 0) if operation == "all_reduce" else ("gather", None)
    assert calls == [(kind, data_type, sum_, COMMUNICATOR, None)] * 2


@pytest.mark.parametrize("shape", [["n", 7], [4, 7], ["a", "b", 3]])
def test_a_sum_has_a_known_shape(shape):
    session = open_session(make_model(1, "all_reduce", shape), CollectiveGroup(SIZE))
    assert session.get_outputs()[0].shape == shape


def test_failures_become_messages():
    group, library = CollectiveGroup(SIZE), make_library([])
    session = open_session(make_model(1, "all_reduce", ["n", 7]), group)
    value = np.zeros((11, 7), np.float32)
    with pytest.raises(Exception, match="AllReduce: the ranks are not connected"):
        session.run(None, {"x": value})
    group.connect(COMMUNICATOR, library)
    with pytest.raises(Exception, match="AllReduce: error number 5"):
        session.run(None, {"x": value})
    assert np.array_equal(session.run(None, {"x": value[:1]})[0], value[:1])


def test_several_groups_in_one_process():
    calls: list[list[tuple]] = [[], []]
    libraries = [make_library(each) for each in calls]
    groups = [CollectiveGroup(SIZE) for _ in libraries]
    sessions = [open_session(make_model(1, "all_reduce", ["n", 7]), group) for group in groups]
    for number, (group, library) in enumerate(zip(groups, libraries, strict=True)):
        group.connect(number + 1, library)
    for session in (*sessions, sessions[0]):
        session.run(None, {"x": np.zeros((1, 7), np.float32)})
    assert [[call[3] for call in each] for each in calls] == [[1, 1], [2]]


REMEDY = "several ranks on GPUs need it: pip install nccl4py nvidia-nccl-cu13"


def test_reasons_for_the_cpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "nccl", None)
    assert collectives.collectives_obstacle() == f"NCCL is not installed; {REMEDY}"

    def fail_to_load() -> None:
        raise RuntimeError('Failure finding "libnccl.so.2"\nin these folders')

    package = SimpleNamespace(core=SimpleNamespace(get_version=fail_to_load))
    monkeypatch.setitem(sys.modules, "nccl", package)
    assert collectives.collectives_obstacle() == (
        f'NCCL cannot be loaded (Failure finding "libnccl.so.2"); {REMEDY}'
    )
    monkeypatch.setattr(collectives, "nccl_obstacle", lambda: None)
    assert collectives.collectives_obstacle() is None

    def fail(_: object) -> None:
        raise MptTrtError("there is no C compiler (cc, gcc, clang); install one")

    monkeypatch.setattr(collectives, "compiled_library", fail)
    assert collectives.collectives_obstacle() == (
        "there is no C compiler (cc, gcc, clang); install one"
    )
