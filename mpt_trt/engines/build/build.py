"""Builds plans from networks, and whole engine directories from FT checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from mpt_trt.engines.build.assemble import write_manifest
from mpt_trt.engines.build.rank_network import NetworkInputs, write_networks
from mpt_trt.engines.compute_capabilities import require_buildable, require_fp8_support
from mpt_trt.engines.manifest import ENGINE, remember_engine
from mpt_trt.engines.rank_descriptions import (
    engine_name,
    network_name,
    plan_description_name,
    read_network_hash,
    read_network_spec,
    require_whole_network,
    write_plan_description,
)
from mpt_trt.engines.spec import TENSORRT_RTX, BuilderChoice
from mpt_trt.engines.tensorrt import plan_builder
from mpt_trt.engines.tensorrt.packages import choose_package
from mpt_trt.engines.tensorrt.plan_builder import BuildOptions
from mpt_trt.errors import MptTrtError
from mpt_trt.network.external_files import read_network
from mpt_trt.quantization.schemes import Quantization, SmoothQuant
from mpt_trt.system import gpus
from mpt_trt.system.disk_sync import sync
from mpt_trt.system.progress_lines import Advance, no_progress
from mpt_trt.system.replace import replace_directory, require_writable
from mpt_trt.system.staging import move_together, staging_directory

PlanBuilder = Callable[[Path, BuilderChoice, int], None]
"""Adds the plans of all ranks to the folder of their networks.

Arguments: folder, builder, tp_size.
"""


def build_rank(
    networks: Path, rank: int, builder: BuilderChoice, target: Path, is_trusted: bool = False
) -> None:
    """Adds one rank's plan and its description to `target`.

    The files appear when they are complete, the plan last. A plan whose description is of another
    build, because a process was killed between the two, is refused by its hash. networks: folder of
    the network. is_trusted: the network's files are not compared with the recorded hashes.
    """
    require_whole_network(networks, rank, is_trusted)
    _require_capable_gpus(builder, read_network_spec(networks, rank).quantization)
    names = (plan_description_name(rank), engine_name(rank))
    for name in names:
        require_writable(target / name)
    with staging_directory(target / engine_name(rank)) as folder:
        _build_plan(networks, rank, builder, folder)
        sync(folder)
        move_together(folder, names, target)


def build_one_by_one(folder: Path, builder: BuilderChoice, tp_size: int) -> None:
    """Adds the plans of all ranks to the folder of their networks."""
    for rank in range(tp_size):
        _build_plan(folder, rank, builder, folder)


def build_engine(
    inputs: NetworkInputs,
    builder: BuilderChoice,
    target: Path,
    build_plans: PlanBuilder = build_one_by_one,
    force: bool = False,
    progress: AbstractContextManager[Advance] | None = None,
) -> None:
    """Makes the engine directory `target` of all ranks.

    force: see `require_replaceable`. progress: counts the bytes of the networks' weights.
    """
    tp_size = inputs.checkpoint.tp_size
    _require_capable_gpus(builder, inputs.calibrated.quantization)
    with replace_directory(target, ENGINE, inputs.paths, force) as folder:
        with progress or nullcontext(no_progress) as advance:
            write_networks(inputs, folder, advance)
        build_plans(folder, builder, tp_size)
        write_manifest(folder, [(folder, folder)] * tp_size)
        for description in folder.glob("rank*.json"):
            description.unlink()
    remember_engine(target)


def _build_plan(networks: Path, rank: int, builder: BuilderChoice, folder: Path) -> None:
    spec = read_network_spec(networks, rank)
    package = choose_package(builder.backend)
    options = BuildOptions(package, spec.limits, builder.compute_capabilities)
    plan = folder / engine_name(rank)
    network = networks / network_name(rank)
    # TensorRT's parser follows file names out of the folder.
    read_network(network)
    with _hint_at_int8_kernels(spec.quantization):
        built = plan_builder.build_plan(network, options, plan)
    network_hash = read_network_hash(networks, rank)
    write_plan_description(plan, built.hash, network_hash, built.builder)


def _require_capable_gpus(builder: BuilderChoice, quantization: Quantization) -> None:
    """Raises MptTrtError if one of the GPUs to build for cannot run the engine."""
    package = choose_package(builder.backend)
    if package.module != TENSORRT_RTX:
        # This backend builds for the GPU that it runs on.
        return require_fp8_support(gpus.compute_capabilities()[:1], quantization)
    require_buildable(package, builder.compute_capabilities)
    return require_fp8_support(builder.compute_capabilities, quantization)


@contextmanager
def _hint_at_int8_kernels(quantization: Quantization) -> Iterator[None]:
    """Adds the backend with kernels for 8-bit integers to the error of a failed build."""
    try:
        yield
    except MptTrtError as error:
        if not isinstance(quantization.scheme, SmoothQuant):
            raise
        raise MptTrtError(
            f"{error} (the network multiplies 8-bit integers; if there is no kernel for them here, "
            "use backend tensorrt_llm, which has its own)"
        ) from None
