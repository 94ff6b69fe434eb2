"""The simulated API is the real one: names and parameters agree with the installed bindings.

Everything that the engine calls exists in the simulation, or its tests would fail, so the engine's
half of the API is also checked. The plan builder runs on the real one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import tensorrt_rtx
from cuda.bindings import runtime as cudart

from mpt_trt.engines.tensorrt.plan_builder import _set_flags
from support.simulated import nccl as simulated_nccl
from support.simulated import tensorrt as simulated
from support.simulated.cuda import SimulatedCuda
from support.simulated.install import installed
from support.simulated.rules import Rule
from support.simulated.tensorrt import SimulatedTensorRt

CLASSES = (simulated.Runtime, simulated.ICudaEngine, simulated.IExecutionContext)


def public(kind: type) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(kind).items() if not name.startswith("_")]


METHODS = [
    (kind.__name__, name, value)
    for kind in CLASSES
    for name, value in public(kind)
    if inspect.isfunction(value)
]
PROPERTIES = [
    (kind.__name__, name)
    for kind in CLASSES
    for name, value in public(kind)
    if isinstance(value, property)
]


def parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]


def documented(docstring: str, name: str) -> list[list[str]]:
    """Parameter names of every overload that a docstring of pybind11 lists, without self."""
    calls = re.findall(rf"^(?:\d+\. )?{name}\(self: [^,)]*(?:, )?(.*)\) -> ", docstring, re.M)
    # A default value can contain colons: `strategy: A = <A.STATIC: 0>`.
    calls = [re.sub(r"<[^>]*>", "", call) for call in calls]
    return [re.findall(r"(?:^|, )(\w+): ", call) for call in calls]


@pytest.mark.parametrize(
    ("kind", "name", "method"), METHODS, ids=lambda value: getattr(value, "__name__", value)
)
def test_methods(kind, name, method):
    real = getattr(getattr(tensorrt_rtx, kind), name)
    overloads = documented(real.__doc__, name)
    assert overloads, real.__doc__
    assert parameters(method) in overloads


@pytest.mark.parametrize(("kind", "name"), PROPERTIES)
def test_properties(kind, name):
    assert isinstance(getattr(getattr(tensorrt_rtx, kind), name), property)


def test_enums_and_loggers_are_the_real_ones():
    for name, value in public(SimulatedTensorRt):
        assert value is getattr(tensorrt_rtx, name), name


def test_the_runtime_takes_a_logger():
    text = tensorrt_rtx.Runtime.__init__.__doc__
    assert documented(text, "__init__") == [["logger"]]
    # Ours is one, of a class derived from the real interface.
    assert "ILogger" in text


def functions_of_cuda() -> list[str]:
    return [name for name, _ in public(SimulatedCuda) if name.startswith("cuda")]


@pytest.mark.parametrize("name", [n for n in functions_of_cuda() if n not in ("cuda", "cudart")])
def test_cuda_functions(name):
    first_line = getattr(cudart, name).__doc__.splitlines()[0]
    listed = re.fullmatch(rf"{name}\((.*)\)", first_line)
    assert listed, first_line
    names = [re.sub(r":.*", "", part).split()[-1] for part in listed[1].split(", ") if part]
    assert parameters(getattr(SimulatedCuda, name)) == names


def test_bindings_take_cudas_handles_as_numbers():
    """`stream_handle: SupportsInt`: a stream of cuda.bindings is one."""
    assert list(tensorrt_rtx.Dims([cudart.cudaStream_t(0x1230)])) == [0x1230]


def test_nccl4py():
    """The real package, where it is installed; otherwise what was read in version 0.6.0."""
    core = pytest.importorskip("nccl.core")
    with installed() as simulation:
        made = simulated_nccl.make_core(simulation.world, None)
    real = inspect.signature(core.Communicator.init).parameters
    assert set(inspect.signature(made.Communicator.init).parameters) <= set(real)
    for name in ("destroy", "ptr"):
        assert hasattr(core.Communicator, name)
    assert callable(core.get_unique_id)


def test_every_rule_has_a_name_a_text_and_a_source():
    for rule in Rule:
        assert rule.name.isupper() and rule.text and rule.source
    assert len({rule.text for rule in Rule}) == len(Rule)


def test_plans_are_built_for_captures_and_without_tf32():
    builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR))
    config = builder.create_builder_config()
    flags = tensorrt_rtx.BuilderFlag
    assert config.get_flag(flags.TF32)
    _set_flags(tensorrt_rtx, config)
    assert config.get_flag(flags.REQUIRE_USER_ALLOCATION)
    assert not config.get_flag(flags.TF32)
    # Refitting can lose a product's bias (docs/engine_format.md); plans cannot be refitted.
    assert not config.get_flag(flags.REFIT) and not config.get_flag(flags.REFIT_IDENTICAL)
    assert not config.get_flag(flags.REFIT_INDIVIDUAL) and not config.get_flag(flags.STRIP_PLAN)
