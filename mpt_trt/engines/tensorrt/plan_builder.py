"""Builds TensorRT plans from the networks of ranks.

The same code serves `tensorrt`, which builds on the data-centre GPU that runs the plan, and
`tensorrt_rtx`, which builds ahead of time without a GPU: they share one Python API. A plan has two
optimization profiles, one for prompts and one for single tokens, because TensorRT copies the whole
cache in every layer if one dynamic profile covers both.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from mpt_trt.engines.spec import BuilderInfo, BuildLimits
from mpt_trt.engines.tensorrt.logger import make_logger
from mpt_trt.engines.tensorrt.packages import Package
from mpt_trt.engines.tensorrt.phases import Phases, shown_phases
from mpt_trt.engines.tensorrt.token_choice import add_token_choice
from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpus
from mpt_trt.system.background import Background, background
from mpt_trt.system.files import ContentHash, write_in_pieces
from mpt_trt.system.replace import replace_file

CONTEXT_PROFILE, GENERATION_PROFILE = 0, 1


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build.

    compute_capabilities: GPUs to build for, as "8.9"; only tensorrt_rtx can choose them.
    """

    package: Package
    limits: BuildLimits
    compute_capabilities: tuple[str, ...]


@dataclass(frozen=True)
class BuiltPlan:
    """A finished plan. hash: ContentHash of its file."""

    builder: BuilderInfo
    hash: str


def build_plan(network_path: Path, options: BuildOptions, target: Path) -> BuiltPlan:
    """Builds the TensorRT plan of one rank and writes it to `target`, atomically.

    The plan is hashed while it is written; weights stay memory-mapped until TensorRT packs them.

    Raises MptTrtError with TensorRT's own messages when parsing or building fails, and
    KeyboardInterrupt when interrupted.
    """
    trt = importlib.import_module(options.package.module)
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    builder.max_threads = os.cpu_count() or 1
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(network_path)):
        raise _failure(trt, options, network_path, "parse", logger)
    _let_attention_decompose(trt, network)
    add_token_choice(trt, network)
    config = builder.create_builder_config()
    _set_flags(trt, config)
    for tokens in (options.limits.max_input_len, 1):
        config.add_optimization_profile(_profile(builder, network, options.limits, tokens))
    capabilities = _set_compute_capabilities(trt, config, options)
    with replace_file(target) as partial:
        digest = _stream_plan(trt, builder, network, config, partial, logger, options, network_path)
    builder_info = BuilderInfo(options.package.module, options.package.version, capabilities)
    return BuiltPlan(builder_info, str(digest))


def _stream_plan(
    trt: ModuleType,
    builder: Any,
    network: Any,
    config: Any,
    partial: Path,
    logger: Any,
    options: BuildOptions,
    network_path: Path,
) -> ContentHash:
    with partial.open("wb") as stream, background() as work, _progress(trt) as shown:
        config.progress_monitor, was_interrupted = shown
        writer = _make_writer(trt, stream, work)
        is_built = builder.build_serialized_network_to_stream(network, config, writer)
        if was_interrupted():
            raise KeyboardInterrupt
        if writer.error is not None:
            raise writer.error
        if not is_built:
            raise _failure(trt, options, network_path, "build", logger)
    return writer.digest


def _failure(
    trt: ModuleType, options: BuildOptions, path: Path, action: str, logger: Any
) -> MptTrtError:
    package = f"{options.package.module} {options.package.version}"
    return MptTrtError(f"{path}: {package} cannot {action} the network: {logger.take()}")


def _make_writer(trt: Any, stream: BinaryIO, work: Background) -> Any:
    """Makes the stream writer that TensorRT passes its plan to.

    It writes a piece while TensorRT packs the next one. `error` is the error that stopped it, and
    `digest` the hash of the written content.
    """

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None
            self.digest = ContentHash()

        def write(self, data: bytes) -> int:
            # An exception must not pass through TensorRT's frames; a short count stops it.
            try:
                work.start(functools.partial(self._store, data))
            except OSError as error:
                self.error = error
                return 0
            return len(data)

        def _store(self, data: bytes) -> None:
            write_in_pieces(stream, data)
            self.digest.update(data)

    return Writer()


@contextmanager
def _progress(trt: Any) -> Iterator[tuple[Any, Callable[[], bool]]]:
    """Shows TensorRT's phases, as bars on a terminal or as lines.

    Ctrl-C and SIGTERM stop it at the next step. Yields the monitor and a function that returns
    whether it was interrupted.
    """
    interrupted: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {n: signal.signal(n, lambda number, _: interrupted.append(number)) for n in numbers}

    class Monitor(trt.IProgressMonitor):
        def __init__(self, phases: Phases) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = phases

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase is None, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.update(phase_name, step + 1)
            return not interrupted

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

    try:
        with shown_phases() as phases:
            yield Monitor(phases), lambda: bool(interrupted)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _set_flags(trt: ModuleType, config: Any) -> None:
    """Sets the flags of a plan that is captured in CUDA graphs and computes float32 as float32."""
    # By default, TensorRT may round the factors of float32 products to TF32's 10-bit mantissas.
    config.clear_flag(trt.BuilderFlag.TF32)
    # TensorRT-RTX needs it for plans whose steps are captured; `tensorrt` does not have it.
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def _let_attention_decompose(trt: ModuleType, network: Any) -> None:
    """Lets TensorRT decompose attention that it has no fused kernel for, e.g. in float32."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True


def _profile(builder: Any, network: Any, limits: BuildLimits, tokens: int) -> Any:
    """Makes a profile for steps of up to `tokens` tokens per row, tuned for one row."""
    max_logits = min(limits.max_logits, limits.max_batch_size * tokens)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        smallest, largest = list(tensor.shape), list(tensor.shape)
        smallest[0], largest[0] = 1, limits.max_batch_size
        if tensor.name == "input_ids":
            smallest[1] = 1
            largest[1] = tokens
        if tensor.name == "logit_positions":
            largest[0] = max_logits
        typical = [1, *largest[1:]]
        profile.set_shape(tensor.name, smallest, typical, largest)
    return profile


def _set_compute_capabilities(
    trt: ModuleType, config: Any, options: BuildOptions
) -> tuple[str, ...]:
    """Sets the GPUs to build for; returns them as "8.9"."""
    if not hasattr(config, "num_compute_capabilities"):
        return gpus.compute_capabilities()[:1]
    names = [f"SM{capability.replace('.', '')}" for capability in options.compute_capabilities]
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    return options.compute_capabilities
