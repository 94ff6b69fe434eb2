"""The rules of TensorRT and CUDA that the simulation enforces, with their sources.

Sources: NvInferRuntime.h and NvInfer.h are TensorRT's headers, which its API reference is made
from; "docstring" means the Python bindings'; TensorRT-RTX and TensorRT have the same runtime API.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Rule(Enum):
    """Name and source of each rule."""

    # CUDA
    MEMORY_LIVE = (
        "every byte that is read or written lies in one allocation that has not been freed",
        "CUDA Runtime API, cudaMalloc, cudaFree",
    )
    COPY_KIND = (
        "the kind of a copy agrees with its addresses",
        "CUDA Runtime API, cudaMemcpyAsync: other directions are undefined behaviour",
    )
    BOX_IN_ARRAY = (
        "a 3D copy stays inside the arrays",
        "CUDA Runtime API, cudaMemcpy3D: an extent outside of the region is an error",
    )
    HANDLE_LIVE = (
        "streams, events and graphs are used only between creation and destruction, once",
        "CUDA Runtime API, cudaStreamDestroy, cudaEventDestroy, cudaGraphExecDestroy",
    )
    CAPTURE_HOST_WAIT = (
        "nothing waits for the device while a stream is captured",
        "CUDA Programming Guide, CUDA Graphs, Prohibited and Unhandled Operations",
    )
    CAPTURE_ALLOCATION = (
        "a capture contains no allocation",
        "BuilderFlag.REQUIRE_USER_ALLOCATION's docstring; CUDA Programming Guide, as above",
    )
    CAPTURE_PAGEABLE_MEMORY = (
        "a captured copy does not touch pageable host memory, which replays would read again",
        "CUDA Programming Guide, CUDA Graphs; API Synchronization Behavior",
    )
    HOST_COPY_AWAITED = (
        "the host waits for a copy into pageable memory before it goes on",
        "CUDA Runtime API, API Synchronization Behavior: it only might be synchronous",
    )
    CAPTURE_PAIRED = (
        "a capture begins and ends once, on the same stream",
        "CUDA Runtime API, cudaStreamBeginCapture, cudaStreamEndCapture",
    )
    RELEASED = (
        "memory, streams, events, graphs, contexts and communicators are released",
        "CUDA Runtime API, as above",
    )
    # TensorRT
    ADDRESS_SET = (
        "every input and output has an address",
        "NvInferRuntime.h, IExecutionContext::enqueueV3",
    )
    ADDRESS_ALIGNED = (
        "addresses of tensors are multiples of 256",
        "NvInferRuntime.h, IExecutionContext::setTensorAddress",
    )
    BUFFER_LARGE_ENOUGH = (
        "a tensor's buffer holds its shape",
        "NvInferRuntime.h, IExecutionContext::setTensorAddress: a buffer of sufficient size",
    )
    KNOWN_TENSOR = (
        "names are those of the plan's inputs and outputs",
        "NvInferRuntime.h, IExecutionContext::setTensorAddress, setInputShape",
    )
    SHAPE_SET = (
        "the shape of every dynamic input is set",
        "docstring of IExecutionContext.infer_shapes",
    )
    SHAPE_IN_PROFILE = (
        "shapes lie between the profile's minimum and maximum",
        "NvInferRuntime.h, IExecutionContext::setInputShape",
    )
    SHAPES_CONSISTENT = (
        "dimensions of the same name have the same size",
        "NvInferRuntime.h, IExecutionContext::inferShapes",
    )
    CACHE_ALIASED = (
        "past and present of an in-place cache share one address",
        "TensorRT documentation, KV Cache; docstring of ICudaEngine.get_aliased_input_tensor",
    )
    OUTPUTS_APART = (
        "other tensors do not overlap what the step writes",
        "TensorRT documentation, KV Cache: only aliased tensors share memory",
    )
    SCRATCH_SET = (
        "contexts have scratch memory, and the application gives it to them",
        "docstrings of BuilderFlag.REQUIRE_USER_ALLOCATION and of "
        "ExecutionContextAllocationStrategy.USER_MANAGED",
    )
    SCRATCH_ALIGNED = (
        "scratch memory is 256-byte aligned",
        "docstring of IExecutionContext.set_device_memory",
    )
    SCRATCH_LARGE_ENOUGH = (
        "scratch memory has at least device_memory_size_v2 bytes",
        "docstring of IExecutionContext.set_device_memory",
    )
    SCRATCH_EXCLUSIVE = (
        "contexts that run at the same time do not share scratch memory",
        "docstring of IExecutionContext.set_device_memory",
    )
    PROFILE_EXCLUSIVE = (
        "contexts that run at the same time do not share a profile",
        "NvInferRuntime.h, IExecutionContext::setOptimizationProfileAsync",
    )
    PROFILE_VALID = (
        "a profile's index is below num_optimization_profiles",
        "NvInferRuntime.h, IExecutionContext::setOptimizationProfileAsync",
    )
    PROFILE_SYNCHRONIZED = (
        "a step waits for the stream on which its profile was set",
        "docstring of IExecutionContext.set_optimization_profile_async",
    )
    CAPTURE_AFTER_PLAIN_RUN = (
        "a step runs plainly with the same shapes before it is captured",
        "TensorRT documentation, Best Practices, CUDA Graphs",
    )
    GRAPH_MATCHES_CONTEXT = (
        "the context of a captured step is not changed before its graph is launched",
        "TensorRT documentation, Best Practices, CUDA Graphs: one context per captured graph",
    )
    NONDEFAULT_STREAM = (
        "steps run on a stream of their own",
        "docstring of IExecutionContext.execute_async_v3",
    )
    COMMUNICATOR_SET = (
        "a step of several ranks has a communicator that is alive",
        "docstring of IExecutionContext.set_communicator",
    )

    def __init__(self, text: str, source: str):
        self.text, self.source = text, source


class Violation(AssertionError):
    """A broken rule."""


@dataclass
class Book:
    """Broken rules of a simulation. Also keeps those that Python swallows, as in `__del__`."""

    violations: list[str] = field(default_factory=list)

    def broken(self, rule: Rule, detail: str) -> Violation:
        """The error to raise."""
        text = f"{rule.name}: {detail}; {rule.text} [{rule.source}]"
        self.violations.append(text)
        return Violation(text)

    def require(self, is_kept: bool, rule: Rule, detail: str) -> None:
        if not is_kept:
            raise self.broken(rule, detail)
