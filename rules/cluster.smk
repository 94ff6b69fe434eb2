"""What jobs ask of this machine or of a cluster's scheduler, and how they get it.

`site` of config.yaml says which GPUs there are; docs/clusters.md. No job's outcome depends on what is
here.
"""

import json
import re
import shlex
from dataclasses import asdict
from types import SimpleNamespace

from mpt_trt.workflow import gpu_request
from mpt_trt.workflow.gpu_request import GpuRequest
from mpt_trt.workflow.preflight import Needs


@functools.cache
def site_has_gpus() -> bool:
    return checked(gpu_request.has_gpus, settings.site)


@functools.cache
def most_gpus() -> int:
    """Of this machine or of a node of the cluster."""
    return gpu_request.most_gpus(settings.site)


def with_gpus(count: int) -> list[str]:
    """What gives a command `count` GPUs of its own, or hides all from it."""
    return ["python", "workflow_scripts/steps/with_gpus.py", f"--gpus={count}", "--"]


def request(wildcards, count: int) -> GpuRequest:
    """For GPUs that each hold a rank of the engine; refused if there cannot be so many."""
    checked(gpu_request.require_gpus, settings.site, count)
    needed = memory.gpu_memory(engine_spec(wildcards))
    return checked(gpu_request.gpu_request, settings.site, count, needed)


def asking(request_of, name: str):
    """A resource: one field of the request that `request_of` makes for a job."""

    @readable
    def field(wildcards):
        return getattr(request_of(wildcards), name)

    return field


# checkpoint.smk


def linking_mem_mb(wildcards) -> int:
    return megabytes(memory.linking_memory())


def fetch_runtime(wildcards) -> int:
    return memory.fetch_minutes(planned_config(wildcards))


def conversion_runtime(wildcards) -> int:
    config, tp_size = planned_config(wildcards), int(wildcards.tp)
    legal = tp_size if sharding.is_legal(config, tp_size) else 1
    return memory.conversion_minutes(config, storage_type(wildcards), legal)


# engine.smk


def network_runtime(wildcards) -> int:
    return memory.network_minutes(engine_spec(wildcards))


def most_at_once(wildcards) -> int:
    """How many ranks of an engine are built at a time, if there are GPUs for them."""
    # TensorRT-LLM builds all.
    is_limited = variant_of(wildcards).backend != TENSORRT_LLM
    return min(int(wildcards.tp), settings.site.plans_at_once) if is_limited else int(wildcards.tp)


def ranks_at_once(wildcards) -> int:
    most = most_at_once(wildcards)
    return min(most, max(1, most_gpus())) if builds_on_gpu(wildcards) else most


def builds_on_gpu(wildcards) -> bool:
    """One that the rank has to itself: `tensorrt` does, `tensorrt_rtx` needs none."""
    return variant_of(wildcards).backend != TENSORRT_LLM and backend(wildcards) == "tensorrt"


def build_threads(wildcards) -> int:
    return 2 * ranks_at_once(wildcards)


def build_runtime(wildcards) -> int:
    rounds = -(-int(wildcards.tp) // ranks_at_once(wildcards))
    return memory.build_minutes(engine_spec(wildcards), rounds)


def collect_runtime(wildcards) -> int:
    return memory.collect_minutes(engine_spec(wildcards))


def build_gpus(wildcards) -> int:
    return ranks_at_once(wildcards) if builds_on_gpu(wildcards) else 0


def build_request(wildcards) -> GpuRequest:
    return request(wildcards, build_gpus(wildcards))


# quantize.smk


def calibration_request(wildcards) -> GpuRequest:
    """One GPU, which holds what a processor would need as memory."""
    count = calibration_gpus(wildcards)
    checked(gpu_request.require_gpus, settings.site, count)
    calibration, config = settings.calibration, planned_config(wildcards)
    needed = memory.calibration_memory(config, calibration.num_samples, calibration.sequence_length)
    return checked(gpu_request.gpu_request, settings.site, count, needed)


def calibration_gpus(wildcards) -> int:
    device = settings.calibration.device
    return int(device == "cuda" or (device == "auto" and site_has_gpus()))


def calibration_runtime(wildcards) -> int:
    calibration, config = settings.calibration, planned_config(wildcards)
    tokens = calibration.num_samples * calibration.sequence_length
    return memory.calibration_minutes(config, tokens, bool(calibration_gpus(wildcards)))


# verify.smk and report.smk: what the ranks of an engine do together


def ranks_request(wildcards) -> GpuRequest:
    return request(wildcards, int(wildcards.tp) if site_has_gpus() else 0)


def nodes_of_ranks(wildcards) -> int:
    return gpu_request.num_nodes(settings.site, int(wildcards.tp))


def smoke_test_mem_mb(wildcards) -> int:
    """Of each node."""
    spec = engine_spec(wildcards)
    nodes = nodes_of_ranks(wildcards) if spec.tp_size == int(wildcards.tp) else 1
    return megabytes(memory.smoke_test_memory(spec, nodes))


def smoke_test_runtime(wildcards) -> int:
    # A character of the prompt is a token at most, but for rare bytes.
    steps = len(settings.smoke_test.prompt) + settings.smoke_test.max_new_tokens
    return memory.smoke_test_minutes(engine_spec(wildcards), steps)


def reference_runtime(wildcards) -> int:
    quality, config = settings.quality, planned_config(wildcards)
    return memory.forward_minutes(config, quality.num_windows * quality.window_length)


def quality_runtime(wildcards) -> int:
    quality, spec = settings.quality, engine_spec(wildcards)
    tokens = quality.num_windows * quality.window_length
    return memory.quality_minutes(spec, tokens)


def mpi(wildcards) -> str | None:
    """What starts a process a rank; nothing for one rank."""
    return None if wildcards.tp == "1" else settings.site.mpi


def tasks(wildcards) -> int | None:
    """All ranks, where `tasks_per_node` cannot say it: that must be more than one."""
    ranks, nodes = int(wildcards.tp), nodes_of_ranks(wildcards)
    return ranks if 1 < ranks == nodes else None


def tasks_per_node(wildcards) -> int | None:
    each = int(wildcards.tp) // nodes_of_ranks(wildcards)
    return each if each > 1 else None


def tasks_per_gpu(wildcards) -> int | None:
    """0 keeps SLURM's plugin from taking `tasks` for the tasks of one GPU."""
    return None if wildcards.tp == "1" else 0


# The next ones are parameters. Where a job runs says nothing about its outcome, so they ask for
# `output`: Snakemake leaves such parameters out when it compares, and another site repeats nothing.


def slots_of_ranks(wildcards, output) -> list[str]:
    on_this_node = int(wildcards.tp) // nodes_of_ranks(wildcards)
    return with_gpus(on_this_node if site_has_gpus() else 0)


def launcher(wildcards, output) -> list[str]:
    command = mpi(wildcards)
    return [] if command is None else [*shlex.split(command), "-n", wildcards.tp]


def calibration_slots(wildcards, output) -> list[str]:
    return with_gpus(calibration_gpus(wildcards))


def build_slots(wildcards, output) -> list[str]:
    count = build_gpus(wildcards)
    return with_gpus(count) if count else []


def plans_at_once(wildcards, output) -> int:
    return ranks_at_once(wildcards)


def preflight_for_build(wildcards, output) -> list[str]:
    return preflight_once(wildcards) if build_gpus(wildcards) else []


def preflight_for_ranks(wildcards, output) -> list[str]:
    return preflight_once(wildcards) if site_has_gpus() else []


# preflight.smk

ENGINE_TARGET = re.compile(
    r"(?:trt_engines|smoke_tests|quality)/(?P<model>[^/]+)/(?P<variant>[^/]+)/(?P<tp>[1-9]\d*)-gpu"
    r"(?:\.json)?"
)
# A command line has room for about twice as many.
MOST_TARGETS = 200


def preflight_once(wildcards) -> list[str]:
    """Shows what a machine has before its first GPU job."""
    engine = f"trt_engines/{wildcards.model}/{wildcards.variant}/{wildcards.tp}-gpu"
    needs = json.dumps([asdict(needs_of(engine, wildcards))])
    return ["python", "workflow_scripts/preflight.py", "--once=logs/preflight", f"--needs={needs}"]


def needs_of_targets(wildcards) -> str:
    """What the engines among the targets need, as JSON."""
    matches = [match for target in settings.targets if (match := ENGINE_TARGET.fullmatch(target))]
    found = (needs_of(match[0], SimpleNamespace(**match.groupdict())) for match in matches)
    return json.dumps([asdict(needs) for needs, _ in zip(found, range(MOST_TARGETS))])


def needs_of(target: str, wildcards) -> Needs:
    variant, spec = variant_of(wildcards), engine_spec(wildcards)
    return Needs(
        target=target,
        backend=variant.backend,
        compute_capabilities=variant.compute_capabilities,
        ranks=int(wildcards.tp),
        gpu_memory=memory.gpu_memory(spec),
        build_memory=most_at_once(wildcards) * memory.build_memory(spec),
        run_memory=memory.smoke_test_memory(spec),
        disk=memory.ft_checkpoint_disk(spec) + memory.engine_disk(spec),
        is_calibrated=bool(calibration_of_variant(wildcards)),
    )
