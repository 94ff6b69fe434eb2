"""Checks of every call to TensorRT's runtime, around the real module.

These are the rules of support/simulated/rules.py that can be checked without knowing what the GPU
does. A broken rule is noted, and the call goes on.
"""

from __future__ import annotations

from typing import Any

from support.simulated.rules import Rule

ALIGNMENT = 256


class Forwarding:
    """Passes on what a class does not define itself."""

    def __init__(self, real: Any, broken: list[str]):
        self._real, self._broken = real, broken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _note(self, is_kept: bool, rule: Rule, detail: str) -> None:
        text = f"{rule.name}: {detail}"
        if not is_kept and text not in self._broken:
            self._broken.append(text)


class CheckedTensorRt(Forwarding):
    """The module. broken: gets the rules that are broken."""

    def Runtime(self, logger: Any) -> CheckedRuntime:
        return CheckedRuntime(self._real.Runtime(logger), self._broken)


class CheckedRuntime(Forwarding):
    def deserialize_cuda_engine(self, serialized_engine: Any) -> CheckedEngine | None:
        engine = self._real.deserialize_cuda_engine(serialized_engine)
        return None if engine is None else CheckedEngine(engine, self._broken)


class CheckedEngine(Forwarding):
    def create_execution_context(self, strategy: Any) -> CheckedContext | None:
        context = self._real.create_execution_context(strategy)
        if context is None:
            return None
        return CheckedContext(context, self._broken, self._real)


class CheckedContext(Forwarding):
    def __init__(self, real: Any, broken: list[str], engine: Any):
        super().__init__(real, broken)
        self._engine = engine
        self._profile = 0
        self._addresses: dict[str, int] = {}
        self._has_scratch = self._has_run = False
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._aliases = {
            name: source for name in names if (source := engine.get_aliased_input_tensor(name))
        }
        self._names = names

    def set_device_memory(self, memory: int, size: int) -> None:
        self._note(memory % ALIGNMENT == 0, Rule.SCRATCH_ALIGNED, hex(memory))
        needed = self._engine.device_memory_size_v2
        self._note(size >= needed, Rule.SCRATCH_LARGE_ENOUGH, f"{size} < {needed}")
        self._has_scratch = True
        self._real.set_device_memory(memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: Any) -> bool:
        is_known = 0 <= profile_index < self._engine.num_optimization_profiles
        self._note(is_known, Rule.PROFILE_VALID, str(profile_index))
        self._profile = profile_index
        return self._real.set_optimization_profile_async(profile_index, stream_handle)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._note(name in self._names, Rule.KNOWN_TENSOR, name)
        self._note(memory % ALIGNMENT == 0, Rule.ADDRESS_ALIGNED, name)
        self._addresses[name] = memory
        return self._real.set_tensor_address(name, memory)

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        fits = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        self._note(fits, Rule.SHAPE_IN_PROFILE, f"{name} {shape}")
        self._has_run = False
        return self._real.set_input_shape(name, shape)

    def execute_async_v3(self, stream_handle: Any) -> bool:
        missing = [name for name in self._names if name not in self._addresses]
        self._note(not missing, Rule.ADDRESS_SET, ", ".join(missing))
        self._note(self._has_scratch, Rule.SCRATCH_SET, "a step")
        for output, source in self._aliases.items():
            is_shared = self._addresses.get(output) == self._addresses.get(source)
            self._note(is_shared, Rule.CACHE_ALIASED, output)
        unknown = self._real.infer_shapes()
        self._note(not unknown, Rule.SHAPE_SET, ", ".join(unknown))
        return self._real.execute_async_v3(stream_handle)
