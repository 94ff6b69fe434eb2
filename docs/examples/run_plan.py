"""Greedy decoding with one rank's plan, using only TensorRT and CUDA's Python bindings.

    python docs/examples/run_plan.py trt_engines/mpt-demo/fp16/1-gpu 16 5 17 42

prints 16 tokens that follow the tokens 5, 17 and 42. docs/engine_format.md describes the tensors
and the protocol.
"""

import importlib
import json
import math
import sys
from array import array
from pathlib import Path

from cuda.bindings import runtime as cudart

KIND = cudart.cudaMemcpyKind
PROMPT_PROFILE, TOKEN_PROFILE = 0, 1


def check(result: tuple) -> object:
    """The value that a call of CUDA returns; fails with its status if that is an error."""
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        raise RuntimeError(cudart.cudaGetErrorString(status)[1].decode())
    return values[0] if values else None


def require(is_done: object, what: str) -> None:
    """Fails when a call of TensorRT has returned False or None; its logger has said why."""
    if not is_done:
        raise RuntimeError(f"failed to {what}")


class Plan:
    """A plan, a context for each of its profiles, and a buffer for each of its tensors."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "config.json").read_text())
        trt = importlib.import_module(config["builder"]["package"])
        self.stream = check(cudart.cudaStreamCreate())
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        plan = (folder / config["ranks"][0]["engine"]).read_bytes()
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        require(self.engine is not None, "load the plan on this GPU")
        engine, limits = self.engine, config["limits"]
        self.vocab_size = config["config"]["vocab_size"]
        self.longest = limits["max_input_len"]
        self.inputs, self.shapes, self.buffers = [], {}, {}
        sizes = {"input_ids": (1, self.longest), "write_positions": (1,), "logit_positions": (1, 2)}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            shape = list(engine.get_tensor_shape(name))
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self.inputs.append(name)
            if name.startswith("new_"):  # of a cache of 8 bits
                shape[2] = self.longest
            shape = sizes.get(name, [1, *shape[1:]])  # one row
            self.shapes[name] = tuple(shape)
            source = engine.get_aliased_input_tensor(name)
            if source is None:
                size = math.prod(shape) * engine.get_tensor_dtype(name).itemsize
                self.buffers[name] = check(cudart.cudaMalloc(size))
                check(cudart.cudaMemset(self.buffers[name], 0, size))
            else:  # present_key.0 and past_key.0 are one buffer
                self.buffers[name] = self.buffers[source]
        self.scratch_size = max(1, engine.device_memory_size_v2)
        self.scratch = check(cudart.cudaMalloc(self.scratch_size))
        # Plans are built for memory that the application manages. Contexts that run one after the
        # other share it.
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        profiles = (PROMPT_PROFILE, TOKEN_PROFILE)
        self.contexts = [self.create_context(managed, profile) for profile in profiles]

    def create_context(self, strategy: object, profile: int) -> object:
        context = self.engine.create_execution_context(strategy)
        require(context is not None, "create a context")
        context.set_device_memory(self.scratch, self.scratch_size)
        require(context.set_optimization_profile_async(profile, self.stream), "set the profile")
        for name, address in self.buffers.items():
            require(context.set_tensor_address(name, address), f"set the address of {name}")
        for name in self.inputs:
            if name.startswith("past_"):
                require(context.set_input_shape(name, self.shapes[name]), f"shape {name}")
        return context

    def step(self, tokens: list[int], position: int) -> int:
        """Runs the tokens of one row from a position on; returns the most likely next one."""
        feeds = {
            "input_ids": (tokens, (1, len(tokens))),
            "write_positions": ([position], (1,)),
            "logit_positions": ([0, len(tokens) - 1], (1, 2)),
        }
        context = self.contexts[TOKEN_PROFILE if len(tokens) == 1 else PROMPT_PROFILE]
        staged = []
        for name, (numbers, shape) in feeds.items():
            require(context.set_input_shape(name, shape), f"shape {name}")
            staged.append(array("q", numbers))
            address, size = staged[-1].buffer_info()[0], 8 * len(numbers)
            kind = KIND.cudaMemcpyHostToDevice
            check(cudart.cudaMemcpyAsync(self.buffers[name], address, size, kind, self.stream))
        require(context.execute_async_v3(self.stream), "run the step")
        self.store(len(tokens), position)
        logits = array("f", bytes(4 * self.vocab_size))
        kind, address = KIND.cudaMemcpyDeviceToHost, logits.buffer_info()[0]
        size = 4 * self.vocab_size
        check(cudart.cudaMemcpyAsync(address, self.buffers["logits"], size, kind, self.stream))
        check(cudart.cudaStreamSynchronize(self.stream))
        return max(range(self.vocab_size), key=logits.__getitem__)

    def store(self, count: int, position: int) -> None:
        """Copies what a step has added to a cache of 8 bits; other caches are updated in place."""
        for name in self.buffers:
            if name.startswith("new_"):
                past = name.replace("new_", "past_")
                _, heads, length, dim = self.shapes[past]  # one byte per element
                target = self.buffers[past] + position * dim
                box = (length * dim, self.buffers[name], count * dim, count * dim, heads)
                kind = KIND.cudaMemcpyDeviceToDevice
                check(cudart.cudaMemcpy2DAsync(target, *box, kind, self.stream))


def main() -> None:
    """Reads the prompt in pieces that the plan takes, then generates token by token."""
    folder, count, *prompt = sys.argv[1], *map(int, sys.argv[2:])
    plan, position, token = Plan(Path(folder)), 0, 0
    for start in range(0, len(prompt), plan.longest):
        piece = prompt[start : start + plan.longest]
        token, position = plan.step(piece, position), position + len(piece)
    generated = [token]
    while len(generated) < count:
        generated.append(plan.step(generated[-1:], position))
        position += 1
    print(*generated)


if __name__ == "__main__":
    main()
